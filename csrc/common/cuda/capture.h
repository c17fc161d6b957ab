// What must not be recorded while a stream is being captured into a graph: loading kernels, allocating memory.
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

}  // namespace interflow
#endif
