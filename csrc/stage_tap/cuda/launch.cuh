// Launching a kernel of the stage tap: the shared memory that kernels of each kind take.
#pragma once
#include "common/cuda/map_launch.cuh"
#include "stage_tap/cuda/staging.cuh"

namespace interflow {

// ring_bytes: of what runs ahead.
inline int tap_pixels_shared(int ring_bytes) { return tap_shared_bytes(kMapThreads * kTapRowWords) + ring_bytes; }

}  // namespace interflow
