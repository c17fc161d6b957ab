// What forward and backward of the stage end share on the host side.
#pragma once
#include "common/cpu/map_units.h"
#include "stage_end/checks.h"
#include "stage_end/cpu/kernels.h"

namespace interflow {

inline constexpr Place kEndPlace{[](const Tensor& t) { return t.is_cpu(); }, "the CPU"};

// The widest set that this processor has.
const EndKernels& end_kernels();

// Units of about 64 KB of u.
EndPlan plan_end(const MapShape& shape, DType dtype);

}  // namespace interflow
