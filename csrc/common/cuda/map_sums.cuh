// What becomes of a unit's sums: the mean of a map, and d(shift).
#pragma once
#include "common/cuda/block_sums.cuh"
#include "common/cuda/map_access.cuh"

namespace interflow {

// A unit's sums, which each(result) gives as result(image of the unit, c, sum), become p, or one of the parts that the last of them adds up.
template <bool kOneImage, class Params, class Each>
__device__ __forceinline__ void finish_means_of(const Params& P, const MapUnit& at, BlockShared& shared, Each each) {
  const MapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab, image = int64_t(at.group) * (kOneImage ? 1 : plan.images);
  auto result = [&](int slot, int c, float sum) {
    if (image + slot >= plan.shape.batch || first + c >= channels) return;
    if (plan.parts == 1)
      P.p[(image + slot) * channels + first + c] = sum * plan.mean;
    else
      P.partial[(image * plan.parts + at.part) * channels + first + c] = sum;
  };
  each(result);
  if (plan.parts > 1 && arrives_last(shared, P.arrivals + image * plan.slabs + at.slab, uint32_t(plan.parts)))
    sum_published_rows(shared, P.partial + image * plan.parts * channels + first, channels, plan.parts, int(min(int64_t(plan.slab), channels - first)),
                       [&](int c, float sum) { P.p[image * channels + first + c] = sum * plan.mean; });
}

// The same of sums in shared.rows() [images, count, slab] behind a barrier.
template <bool kOneImage, class Params>
__device__ __forceinline__ void finish_means(const Params& P, const MapUnit& at, BlockShared& shared, int count) {
  finish_means_of<kOneImage>(P, at, shared, [&](auto result) {
    if constexpr (kOneImage)
      sum_rows(shared, count, P.plan.slab, [&](int c, float sum) { result(0, c, sum); });
    else
      sum_rows(shared, P.plan.images, count, P.plan.slab, result);
  });
}

// A unit's sums, which each(result) gives as result(c, sum), on their way to dshift.
template <class Params, class Each>
__device__ __forceinline__ void finish_sums_of(const Params& P, const MapUnit& at, BlockShared& shared, Each each) {
  const MapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab;
  int these = int(min(int64_t(plan.slab), channels - first)), row = int(at.group) * plan.parts + int(at.part);
  each([&](int c, float sum) {
    if (c < these) P.rows[row * channels + first + c] = sum;
  });

  // Twice at most: rows_at_once rows, then what came of all of these
  int groups = (P.row_count - 1) / P.rows_at_once + 1, group = row / P.rows_at_once;
  const float* rows = P.rows + int64_t(group) * P.rows_at_once * channels;
  int reduction = min(P.rows_at_once, P.row_count - group * P.rows_at_once);
  uint32_t* arrivals = P.arrivals + int64_t(group) * plan.slabs;
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    if (!arrives_last(shared, arrivals + at.slab, uint32_t(reduction))) return;
    bool last = level == 1 || groups == 1;
    float* to = (last ? P.dshift : P.sums + int64_t(group) * channels) + first;
    sum_published_rows(shared, rows + first, channels, reduction, these, [&](int c, float sum) { to[c] = sum; });
    if (last) return;
    rows = P.sums, reduction = groups, arrivals = P.arrivals + int64_t(groups) * plan.slabs;
  }
}

// The same of sums in shared.rows() [count, slab] behind a barrier.
template <class Params>
__device__ __forceinline__ void finish_sums(const Params& P, const MapUnit& at, BlockShared& shared, int count) {
  finish_sums_of(P, at, shared, [&](auto result) { sum_rows(shared, count, P.plan.slab, result); });
}

}  // namespace interflow
