// Launching a kernel over the units of a map, with as many blocks as fit.
#pragma once
#include <algorithm>

#include "common/cuda/launch.h"
#include "common/cuda/map_plan.h"

namespace interflow {

template <class Params>
cudaError_t launch_units(void (*kernel)(Params), const Params& P, int shared_bytes, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  int64_t resident = resident_blocks(kernel, kMapThreads, shared_bytes, &error);
  if (error != cudaSuccess) return error;
  return launch(kernel, {std::min(int64_t(P.plan.units), resident), kMapThreads, shared_bytes, stream}, P);
}

}  // namespace interflow
