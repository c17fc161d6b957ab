// csrc/common/cuda/host.h's twin: CPU tensors as kernel memory, whose extents, rights and unwritten bytes the emulation learns from here.
#pragma once
#include <driver_types.h>

namespace interflow {

// One call of an operator: the tensors that it names are known until it returns.
class __attribute__((visibility("hidden"))) OnDevice {
 public:
  explicit OnDevice(const Tensor& t);
  ~OnDevice();
  OnDevice(const OnDevice&) = delete;
  int device() const { return 0; }
  cudaStream_t stream() const { return nullptr; }
};

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

const void* readable(const Tensor& t);
void* writable(const Tensor& t);

// Zero before every launch, and a fault where they are not zero after it.
uint32_t* counters(int device, cudaStream_t stream, int64_t count);

inline int64_t l2_bytes() { return 50 << 20; }

void check_launch(cudaError_t error, const char* op, const char* kernel);

}  // namespace interflow
