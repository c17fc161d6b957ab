// Launching a kernel of the stage tap over its units, with as many blocks as fit, and the shared memory that kernels of each kind take.
#pragma once
#include <algorithm>

#include "common/cuda/launch.h"
#include "stage_tap/cuda/staging.cuh"

namespace interflow {

inline int tap_pixels_shared() { return tap_shared_bytes(kTapThreads * 8); }

template <class Params>
cudaError_t launch_units(void (*kernel)(Params), const Params& P, int shared_bytes, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  int64_t resident = resident_blocks(kernel, kTapThreads, shared_bytes, &error);
  if (error != cudaSuccess) return error;
  return launch(kernel, {std::min(int64_t(P.plan.units), resident), kTapThreads, shared_bytes, stream}, P);
}

}  // namespace interflow
