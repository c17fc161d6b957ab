// What stage_tap_backward's kernels share: a unit's sums on their way to d(shift).
#pragma once
#include "stage_tap/cuda/access.cuh"
#include "stage_tap/cuda/sums.cuh"
#include "stage_tap/cuda/window.cuh"

namespace interflow {

constexpr int kMaskAtOnce = 4;  // bytes of the mask that are read before the first is used, where only the mean was taken

// A unit's sums, in shared.rows() [count, slab] behind a barrier, on their way to dshift.
__device__ __forceinline__ void finish_sums(const TapBackwardParams& P, const TapUnit& at, TapShared& shared, int count) {
  const TapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab;
  int these = int(min(int64_t(plan.slab), channels - first)), row = int(at.group) * plan.parts + int(at.part);
  sum_rows(shared, count, plan.slab, [&](int c, float sum) {
    if (c < these) P.rows[row * channels + first + c] = sum;
  });

  // Twice at most: rows_at_once rows, then what came of all of these
  int groups = (P.row_count - 1) / P.rows_at_once + 1, group = row / P.rows_at_once;
  const float* rows = P.rows + int64_t(group) * P.rows_at_once * channels;
  int meeting = min(P.rows_at_once, P.row_count - group * P.rows_at_once);
  uint32_t* arrivals = P.arrivals + int64_t(group) * plan.slabs;
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    if (!arrives_last(shared, arrivals + at.slab, uint32_t(meeting))) return;
    bool last = level == 1 || groups == 1;
    float* to = (last ? P.dshift : P.sums + int64_t(group) * channels) + first;
    sum_published_rows(shared, rows + first, channels, meeting, these, [&](int c, float sum) { to[c] = sum; });
    if (last) return;
    rows = P.sums, meeting = groups, arrivals = P.arrivals + int64_t(groups) * plan.slabs;
  }
}

}  // namespace interflow
