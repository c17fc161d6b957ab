// What becomes of a unit's sums: the mean of a map, and d(shift).
#pragma once
#include "common/cuda/block_sums.cuh"
#include "common/cuda/map_access.cuh"

namespace interflow {

// --- the mean of a map -----------------------------------------------------------------------------------------------------------
// Where the units of a map arrive, which are several parts.
template <class Params>
__device__ __forceinline__ Arrivals mean_arrivals(const Params& P, uint32_t unit) {
  MapUnit at(unit, P.plan);
  return {P.arrivals + int64_t(at.group) * P.plan.slabs + at.slab, uint32_t(P.plan.parts)};
}

// A unit's sums, which each(result) gives as result(image of the unit, c, sum), become p, or one of the parts that are added up later.
template <bool kOneImage, class Params, class Each>
__device__ __forceinline__ void leave_means(const Params& P, const MapUnit& at, Each each) {
  const MapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab, image = int64_t(at.group) * (kOneImage ? 1 : plan.images);
  each([&](int slot, int c, float sum) {
    if (image + slot >= plan.shape.batch || first + c >= channels) return;
    if (plan.parts == 1)
      P.p[(image + slot) * channels + first + c] = sum * plan.mean;
    else
      P.partial[(image * plan.parts + at.part) * channels + first + c] = sum;
  });
}

// The mean of the maps of a unit, of which all parts have arrived.
template <class Params>
__device__ __forceinline__ void add_up_means(const Params& P, uint32_t unit, BlockShared& shared) {
  const MapPlan& plan = P.plan;
  MapUnit at(unit, plan);
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab, image = at.group;
  __syncthreads();  // nobody reads what the last sums were shared by
  sum_published_rows(shared, P.partial + image * plan.parts * channels + first, channels, plan.parts, int(min(int64_t(plan.slab), channels - first)),
                     [&](int c, float sum) { P.p[image * channels + first + c] = sum * plan.mean; });
}

// What a round does behind its second barrier. last: what late.last() said between the two.
template <bool kOneImage, class Params, class Each>
__device__ __forceinline__ void finish_means_of(const Params& P, uint32_t unit, BlockShared& shared, LateArrival& late, bool last, Each each) {
  if (unit < P.plan.units) leave_means<kOneImage>(P, MapUnit(unit, P.plan), each);
  late.publish(unit, P.plan.units, [&](uint32_t of) { return mean_arrivals(P, of); });
  if (last) add_up_means(P, unit - late.behind(), shared);
}

// The same of sums in shared.rows() [images, count, slab].
template <bool kOneImage, class Params>
__device__ __forceinline__ void finish_means(const Params& P, uint32_t unit, BlockShared& shared, LateArrival& late, bool last, int count) {
  finish_means_of<kOneImage>(P, unit, shared, late, last, [&](auto result) {
    if constexpr (kOneImage)
      sum_rows(shared, count, P.plan.slab, [&](int c, float sum) { result(0, c, sum); });
    else
      sum_rows(shared, P.plan.images, count, P.plan.slab, result);
  });
}

// --- d(shift) --------------------------------------------------------------------------------------------------------------------
// Rows of sums, one for each unit of a slab, meet twice at most: rows_at_once of them, then what came of all of these.
struct RowGroup {
  int row, group, groups, count;  // count: rows of the group
  template <class Params>
  __device__ __forceinline__ RowGroup(const Params& P, const MapUnit& at)
      : row(int(at.group) * P.plan.parts + int(at.part)), group(row / P.rows_at_once), groups((P.row_count - 1) / P.rows_at_once + 1),
        count(min(P.rows_at_once, P.row_count - group * P.rows_at_once)) {}
};

template <class Params>
__device__ __forceinline__ Arrivals sum_arrivals(const Params& P, uint32_t unit) {
  MapUnit at(unit, P.plan);
  RowGroup rows(P, at);
  return {P.arrivals + int64_t(rows.group) * P.plan.slabs + at.slab, uint32_t(rows.count)};
}

// The sums of the group of a unit, of which all have arrived; those of all groups, if it is the last.
template <class Params>
__device__ __forceinline__ void add_up_sums(const Params& P, uint32_t unit, BlockShared& shared) {
  const MapPlan& plan = P.plan;
  MapUnit at(unit, plan);
  RowGroup group(P, at);
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab;
  int these = int(min(int64_t(plan.slab), channels - first)), reduction = group.count;
  const float* rows = P.rows + int64_t(group.group) * P.rows_at_once * channels;
  __syncthreads();  // nobody reads what the last sums were shared by
#pragma unroll 1
  for (bool last = group.groups == 1;; last = true) {
    float* to = (last ? P.dshift : P.sums + int64_t(group.group) * channels) + first;
    sum_published_rows(shared, rows + first, channels, reduction, these, [&](int c, float sum) { to[c] = sum; });
    if (last) return;
    bool all = arrives_last(shared, P.arrivals + int64_t(group.groups) * plan.slabs + at.slab, uint32_t(group.groups));
    __syncthreads();  // all threads know it before the next round writes there
    if (!all) return;
    rows = P.sums, reduction = group.groups;
  }
}

// What a round does behind its second barrier; each(result) gives a unit's sums as result(c, sum).
template <class Params, class Each>
__device__ __forceinline__ void finish_sums_of(const Params& P, uint32_t unit, BlockShared& shared, LateArrival& late, bool last, Each each) {
  const MapPlan& plan = P.plan;
  if (unit < plan.units) {
    MapUnit at(unit, plan);
    int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab;
    int these = int(min(int64_t(plan.slab), channels - first)), row = RowGroup(P, at).row;
    each([&](int c, float sum) {
      if (c < these) P.rows[row * channels + first + c] = sum;
    });
  }
  late.publish(unit, plan.units, [&](uint32_t of) { return sum_arrivals(P, of); });
  if (last) add_up_sums(P, unit - late.behind(), shared);
}

// The same of sums in shared.rows() [count, slab].
template <class Params>
__device__ __forceinline__ void finish_sums(const Params& P, uint32_t unit, BlockShared& shared, LateArrival& late, bool last, int count) {
  finish_sums_of(P, unit, shared, late, last, [&](auto result) { sum_rows(shared, count, P.plan.slab, result); });
}

}  // namespace interflow
