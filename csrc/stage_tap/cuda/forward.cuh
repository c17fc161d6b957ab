// What stage_tap's kernels share.
#pragma once
#include <type_traits>

#include "common/cuda/map_sums.cuh"
#include "stage_tap/cuda/window.cuh"
