// stage_tap_backward on NHWC maps. kWide: 16-byte accesses everywhere.
#pragma once
#include "stage_tap/cuda/backward.cuh"

namespace interflow {

template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kMapThreads, kWide ? 3 : 2) tap_pixels_backward(const __grid_constant__ TapBackwardParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);

  // This thread's place in a unit
  int columns = plan.slab / V, column = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;  // row: of the sums
  int slot = row / plan.lanes, lane = row - slot * plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + column * V;
    TapGradient<T> gradient[W] = {};

    if (slot < plan.images && image < s.batch && channel < s.channels) {
      int count = int(min(int64_t(V), s.channels - channel));
      float gp[V] = {};
      if (P.dp) load_channels(gp, P.dp + image * P.dp_stride_b, DType::F32, channel, P.dp_stride_c, count, P.dp_wide);
#pragma unroll
      for (int i = 0; i < V; ++i) gp[i] = divided(gp[i], plan.pixels, plan.mean);
#pragma unroll
      for (int q = 0; q < W; ++q) gradient[q].start(gp + q * kPer<T>);
      auto store = [&](T* p, const uint32_t (&d)[W]) {
        if constexpr (kWide)
          store_whole(p, d);
        else
          store_few(p, d, count, P.access);
      };
      T* du = static_cast<T*>(P.du) + image * s.height * s.width * s.channels + channel;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);

      if constexpr (kPool) {
        const uint8_t* mask = P.mask + image * plan.positions * s.channels + channel;
        const T* dm = P.dm ? static_cast<const T*>(P.dm) + image * P.dm_stride_b + channel * P.dm_stride_c : nullptr;
        for (int i = first + lane; i < last; i += plan.lanes) {
          int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
          bool right = 2 * w + 1 < s.width, below = 2 * h + 1 < s.height, complete = right && below;

          // Load
          Vector<uint8_t, V> bytes;
          if constexpr (kWide)
            bytes = load_stream<Vector<uint8_t, V>>(mask + int64_t(i) * s.channels, policy);
          else
            bytes = load_few_bytes<V>(mask + int64_t(i) * s.channels, count);
          uint32_t upstream[W] = {};
          if (dm && complete) {
            const T* from = dm + h * P.dm_stride_h + w * P.dm_stride_w;
            if (P.dm_wide)
              load_whole(upstream, from, policy);
            else
              load_few(upstream, from, count, int(sizeof(T)), P.dm_stride_c);
          }

          // Choose and store, place after place
          uint32_t code[W], of_maximum[W];
          to_top_bytes<T>(bytes, code);
#pragma unroll
          for (int q = 0; q < W; ++q) of_maximum[q] = gradient[q].window(code[q], upstream[q]);
          T* corner = du + (2 * h * s.width + 2 * w) * s.channels;
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if ((j % 2 && !right) || (j / 2 && !below)) continue;
            uint32_t d[W];
#pragma unroll
            for (int q = 0; q < W; ++q) d[q] = gradient[q].place(code[q], of_maximum[q], j);
            store(corner + (j / 2 * s.width + j % 2) * s.channels, d);
          }
        }
      } else {
        int row_bytes = int((s.channels + 7) / 8), mask_step = plan.lanes * row_bytes;
        int64_t du_step = plan.lanes * s.channels;
        const uint8_t* mask = P.mask + (image * plan.positions + first + lane) * row_bytes + channel / 8;
        T* to = du + (first + lane) * s.channels;
        for (int i = first + lane; i < last; i += plan.lanes * kMaskAtOnce, mask += int64_t(mask_step) * kMaskAtOnce) {
          Words<1> byte[kMaskAtOnce];
#pragma unroll
          for (int t = 0; t < kMaskAtOnce; ++t) byte[t] = load_stream_if<1>(i + t * plan.lanes < last, mask + int64_t(mask_step) * t, policy);
#pragma unroll
          for (int t = 0; t < kMaskAtOnce; ++t, to += du_step) {
            if (t > 0 && i + t * plan.lanes >= last) break;
            uint32_t d[W];
#pragma unroll
            for (int q = 0; q < W; ++q) d[q] = gradient[q].element(spread_bits<T>(byte[t].at[0], q));
            store(to, d);
          }
        }
      }
    }

    // Sum over the block, when nobody reads the last unit's sums any more
    if (!P.dshift) continue;
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows()[row * plan.slab + column * V + i] = gradient[i / kPer<T>].sum(i % kPer<T>);
    __syncthreads();
    finish_sums(P, at, shared, plan.images * plan.lanes);
  }
}

}  // namespace interflow
