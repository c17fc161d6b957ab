// What the host side of every CUDA operator needs beside ../host.h: the device and stream to run on, tensors as kernel memory, launch errors.
#pragma once
#include "common/host.h"

// The dispatcher key that the operators register under; the emulation runs the same host code on the CPU.
#ifndef INTERFLOW_KEY
#define INTERFLOW_KEY CUDA
#endif
#if INTERFLOW_EMULATION
#define INTERFLOW_REGISTER_IN(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#else
#include "common/registration.h"
#define INTERFLOW_REGISTER_IN(library, key, m) INTERFLOW_LIBRARY_IMPL(library, key, m)
#endif
#define INTERFLOW_REGISTER(m) INTERFLOW_REGISTER_IN(INTERFLOW_LIBRARY, INTERFLOW_KEY, m)

#if INTERFLOW_EMULATION
#include "emulation_host.h"
#else
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include "capture.h"

namespace interflow {

// Raises where a call of CUDA's runtime failed: with what was being done, cause and, where there is one, remedy.
void check_cuda(cudaError_t error, const char* what);

// Makes a tensor's device current, for torch and for this library's own CUDA runtime, and knows torch's current stream there.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : device_(t.get_device_index()), guard_(device_) {
    check_cuda(choose_device(device_), "choosing the device of a tensor");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  int device() const { return device_; }
  cudaStream_t stream() const { return stream_; }

 private:
  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

// A tensor's memory as a kernel sees it: read only, or written by the launch (and perhaps read after that). The emulation checks accesses by them.
inline const void* readable(const Tensor& t) { return t.const_data_ptr(); }
inline void* writable(const Tensor& t) { return t.mutable_data_ptr(); }

// `count` words of zero that the kernel leaves zero: see counters.h.
uint32_t* counters(int device, cudaStream_t stream, int64_t count);

// The current device's L2 cache, in bytes.
int64_t l2_bytes();

// Raises where a launch failed, naming operator and kernel, with cause and, where there is one, remedy.
void check_launch(cudaError_t error, const char* op, const char* kernel);

}  // namespace interflow
#endif
