// What forward and backward of the stage tap share on the host side.
#pragma once
#include "common/cpu/map_units.h"
#include "stage_tap/checks.h"
#include "stage_tap/cpu/kernels.h"

namespace interflow {

inline constexpr Place kTapPlace{[](const Tensor& t) { return t.is_cpu(); }, "the CPU"};

// The widest set that this processor has.
const TapKernels& tap_kernels();

// Units of about 64 KB of u.
TapPlan plan_tap(const TapShape& shape, DType dtype, bool max_pool);

}  // namespace interflow
