// Launching a kernel of the stage tap: the shared memory that kernels of each kind take.
#pragma once
#include "common/cuda/map_launch.cuh"
#include "stage_tap/cuda/staging.cuh"

namespace interflow {

inline int tap_pixels_shared() { return tap_shared_bytes(kMapThreads * 8); }

}  // namespace interflow
