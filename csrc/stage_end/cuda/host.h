// What forward and backward of the stage end share on the host side of a GPU.
#pragma once
#include "common/cuda/map_host.h"
#include "stage_end/checks.h"
#include "stage_end/cuda/kernels.h"

namespace interflow {

inline constexpr Place kEndPlace{on_device, "the GPU"};

// Units of 16 KB of u and more; raises for what no kernel takes.
EndPlan plan_end_units(const MapShape& shape, DType dtype, const char* op);

// How the kernels read t, or write it (its data are for the caller to fill in).
EndMap end_map(const Tensor& t, const EndPlan& plan);

// Whether 16 bytes are moved at a time wherever there is a map.
inline bool is_wide(const EndPlan& plan, std::initializer_list<int32_t> accesses) {
  return plan.whole && std::all_of(accesses.begin(), accesses.end(), [](int32_t access) { return access == 16; });
}

}  // namespace interflow
