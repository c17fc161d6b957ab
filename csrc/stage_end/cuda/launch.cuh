// The shared memory that the stage end's kernels take.
#pragma once
#include "common/cuda/map_launch.cuh"
#include "stage_end/cuda/chunk.cuh"

namespace interflow {

// NHWC: a row of sums for each thread's vector of channels; NCHW: what a unit's chunks leave.
inline int end_shared_bytes(const EndPlan& plan) {
  return int(sizeof(BlockShared)) + 4 * (plan.shape.channels_last ? kMapThreads * end_vector(plan.dtype) : plan.numbers);
}

}  // namespace interflow
