// What forward and backward of the stage tap share on the host side of a GPU.
#pragma once
#include "stage_tap/checks.h"
#include "common/cuda/map_host.h"
#include "stage_tap/cuda/kernels.h"

namespace interflow {

inline constexpr Place kTapPlace{on_device, "the GPU"};

// Units of about 64 KB of u, 28 KB where they go through shared memory; raises for what no kernel takes.
TapPlan plan_tap_units(const TapShape& shape, DType dtype, bool max_pool, const char* op);

// Whether the plan's units fit into shared memory; where planes follow each other, they go through it.
inline bool can_stage(const TapPlan& plan) { return plan.staged.u > 0; }

}  // namespace interflow
