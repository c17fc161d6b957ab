// What must not be recorded while a stream is being captured into a graph: choosing a device, loading kernels, allocating memory.
#pragma once

#if !INTERFLOW_EMULATION
#include <cuda_runtime_api.h>

namespace interflow {

// While it lives, this thread may do what a global capture forbids elsewhere. Whoever made it asks whether that worked.
class RelaxedCapture {
 public:
  RelaxedCapture() : error_(cudaThreadExchangeStreamCaptureMode(&mode_)) {}
  ~RelaxedCapture() {
    if (error_ == cudaSuccess) (void)cudaThreadExchangeStreamCaptureMode(&mode_);
  }
  RelaxedCapture(const RelaxedCapture&) = delete;
  cudaError_t error() const { return error_; }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // then the one before
  cudaError_t error_;
};

// Makes a device current for this library's own CUDA runtime. The first call for a device sets the runtime up there, and may load all kernels, which a
// global capture forbids: so this may be the first that a capture does.
inline cudaError_t choose_device(int device) {
  RelaxedCapture relaxed;
  return relaxed.error() == cudaSuccess ? cudaSetDevice(device) : relaxed.error();
}

}  // namespace interflow
#endif
