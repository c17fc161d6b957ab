// What stage_tap_backward's kernels share.
#pragma once
#include "common/cuda/map_sums.cuh"
#include "stage_tap/cuda/window.cuh"

namespace interflow {

constexpr int kMaskAtOnce = 4;  // bytes of the mask that are read before the first is used, where only the mean was taken

}  // namespace interflow
