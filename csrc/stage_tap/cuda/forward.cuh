// What stage_tap's kernels share: the shift before a unit, its sums after.
#pragma once
#include <type_traits>

#include "stage_tap/cuda/access.cuh"
#include "stage_tap/cuda/sums.cuh"
#include "stage_tap/cuda/window.cuh"

namespace interflow {

// shift on u's grid; -0, which changes no number, where there is none.
template <class T, int V>
__device__ __forceinline__ void load_shift(uint32_t (&words)[V / kPer<T>], const TapParams& P, int64_t first, int count) {
  float x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = -0.0f;
  if (P.shift) load_channels(x, P.shift, P.shift_dtype, first, P.shift_stride, count, P.shift_wide);
#pragma unroll
  for (int i = 0; i < V / kPer<T>; ++i) {
    float of_word[kPer<T>];
#pragma unroll
    for (int k = 0; k < kPer<T>; ++k) of_word[k] = x[i * kPer<T> + k];
    words[i] = Packed<T>::pack(of_word);
  }
}

// A unit's sums, in shared.rows() [images, count, slab] behind a barrier, become p, or one of the parts that the last of them adds up.
template <bool kOneImage>
__device__ __forceinline__ void finish_means(const TapParams& P, const TapUnit& at, TapShared& shared, int count) {
  const TapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab, image = int64_t(at.group) * (kOneImage ? 1 : plan.images);
  auto result = [&](int slot, int c, float sum) {
    if (image + slot >= plan.shape.batch || first + c >= channels) return;
    if (plan.parts == 1)
      P.p[(image + slot) * channels + first + c] = sum * plan.mean;
    else
      P.partial[(image * plan.parts + at.part) * channels + first + c] = sum;
  };
  if constexpr (kOneImage)
    sum_rows(shared, count, plan.slab, [&](int c, float sum) { result(0, c, sum); });
  else
    sum_rows(shared, plan.images, count, plan.slab, result);
  if (plan.parts > 1 && arrives_last(shared, P.arrivals + image * plan.slabs + at.slab, uint32_t(plan.parts)))
    sum_published_rows(shared, P.partial + image * plan.parts * channels + first, channels, plan.parts, int(min(int64_t(plan.slab), channels - first)),
                       [&](int c, float sum) { P.p[image * channels + first + c] = sum * plan.mean; });
}

}  // namespace interflow
