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

// Whether 16 bytes are moved at a time wherever there is a map; the last one is written.
inline bool is_wide(const EndPlan& plan, const EndMap& first, const EndMap& second, int32_t written) {
  auto fits = [](const EndMap& m) { return !m.map.data || (m.access == 16 && m.dense); };
  return plan.whole && fits(first) && fits(second) && written == 16;
}

}  // namespace interflow
