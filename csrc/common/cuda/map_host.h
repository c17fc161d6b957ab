// What the operators on maps share on the host side of a GPU: how wide accesses may be, and how many rows of sums meet.
#pragma once
#include <cmath>

#include "common/cuda/host.h"
#include "common/cuda/map_plan.h"

namespace interflow {

// The largest power of two up to 16 that divides an address and every distance in bytes.
inline int32_t widest_access(const void* p, std::initializer_list<int64_t> bytes) {
  uint64_t all = reinterpret_cast<uintptr_t>(p) | 16;
  for (int64_t each : bytes) all |= uint64_t(each);
  return int32_t(all & -all);
}

// Rows of d(shift)'s terms, and what comes of as many as meet at a time: about the square root.
struct ReductionRows {
  int64_t rows, at_once, levels;
  explicit ReductionRows(const MapPlan& plan)
      : rows(int64_t(plan.units) / plan.slabs), at_once(std::max<int64_t>(64, int64_t(std::sqrt(double(rows))))), levels((rows + at_once - 1) / at_once) {}
};

// Whether a map is larger than what L2 keeps.
inline bool is_stream(const MapPlan& plan) {
  return plan.shape.batch * plan.shape.channels * plan.shape.pixels() * element_size(plan.dtype) > l2_bytes() / 2;
}

}  // namespace interflow
