// stage_end_backward on NCHW maps, and on whatever has no stride 1. kWide: 16-byte accesses everywhere; kRelu, there: whether v masks; the others ask.
#pragma once
#include "stage_end/cuda/run.cuh"

namespace interflow {

template <class T, bool kRelu, bool kWide>
__global__ void __launch_bounds__(kMapThreads, 2) end_planes_backward(const __grid_constant__ EndBackwardParams P) {
  constexpr int V = kChunk<T>;
  const EndPlan& plan = P.plan;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool relu = kWide ? kRelu : P.v.map.data != nullptr, has_dv = P.dv.map.data != nullptr;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    EndRun run(at, plan);
    int64_t image = at.group, begin = run.begin(plan);
    const T* dv = static_cast<const T*>(P.dv.map.data) + image * P.dv.map.stride_b + begin;
    const T* v = static_cast<const T*>(P.v.map.data) + image * P.v.map.stride_b + begin;
    T* du = static_cast<T*>(P.du) + image * plan.shape.channels * plan.positions + begin;
    int chunks = (run.count + V - 1) / V;
    float alone = 0;
    auto dp_of = [&](int plane) { return P.dp && plane < run.planes ? P.dp[image * P.dp_stride_b + (run.channel + plane) * P.dp_stride_c] : -0.0f; };

    for (int first = 0; first < chunks; first += kMapThreads * kEndAtOnce) {
      // Load
      Chunk upstream[kEndAtOnce], value[kEndAtOnce];
      EndSplit split[kEndAtOnce];
      float dp[kEndAtOnce];
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        int chunk = first + j * kMapThreads + int(threadIdx.x);
        bool inside = chunk < chunks;
        if constexpr (kWide) {
          load_whole_if(upstream[j], inside && has_dv, dv + chunk * V, policy);
          if constexpr (kRelu) load_whole_if(value[j], inside, v + chunk * V, policy);
        } else if (inside) {
          int count = min(V, run.count - chunk * V);
          if (has_dv) load_chunk<T>(upstream[j], P.dv, image, run, plan, chunk, count);
          if (relu) load_chunk<T>(value[j], P.v, image, run, plan, chunk, count);
        }
      }
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        split[j] = EndSplit::of<V>(min(first + j * kMapThreads + int(threadIdx.x), chunks - 1), plan);
        dp[j] = dp_of(split[j].plane);
      }
      if (first == 0) __syncthreads();  // nobody reads the last unit's sums any more

      // Add, mask, store, sum
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        int chunk = first + j * kMapThreads + int(threadIdx.x);
        if (chunk >= chunks) break;
        int count = kWide ? V : min(V, run.count - chunk * V);
        float gp[V], d[V], left = divided(dp[j], plan.pixels, plan.mean);
#pragma unroll
        for (int i = 0; i < V; ++i) gp[i] = left;
        if (!kWide && plan.slots > 2) {  // each element may be of another plane
#pragma unroll
          for (int i = 0; i < V; ++i) gp[i] = divided(dp_of(int(divide(uint32_t(chunk * V + i), plan.plane))), plan.pixels, plan.mean);
        } else if (split[j].left < V) {
          float right = divided(dp_of(split[j].plane + 1), plan.pixels, plan.mean);
#pragma unroll
          for (int i = 0; i < V; ++i) gp[i] = i < split[j].left ? left : right;
        }
        if (!has_dv) set_minus_zero<T>(upstream[j]);
        Chunk out;
        end_gradient<T>(d, out, upstream[j], gp, value[j], relu);
        if constexpr (kWide)
          store_whole(du + chunk * V, out);
        else
          store_few(du + chunk * V, out, count, P.du_access);
        if (P.dshift) leave_sums<T>(shared.rows(), alone, plan, chunk, split[j], [&](int i) { return kWide || i < count ? d[i] : 0.0f; });
      }
    }

    if (!P.dshift) continue;
    if (plan.slots == 1) shared.rows()[threadIdx.x] = alone;
    __syncthreads();
    finish_sums_of(P, at, shared, [&](auto result) { sum_planes<V>(shared, plan, run, result); });
  }
}

}  // namespace interflow
