// stage_tap_backward on NHWC maps. kWide: 16-byte accesses everywhere.
#pragma once
#include "common/cuda/ring.cuh"
#include "stage_tap/cuda/backward.cuh"

namespace interflow {

// The windows of a thread in the order of its units, whose masks and dm are loaded ahead of the thread.
template <class T, int V>
struct TapGradientsAhead {
  const TapBackwardParams& P;
  uint32_t unit;
  const uint8_t* mask;
  const T* dm;
  int i = 0, last = 0;

  __device__ __forceinline__ explicit TapGradientsAhead(const TapBackwardParams& P) : P(P), unit(blockIdx.x) { enter(); }
  __device__ __forceinline__ void enter() {
    const TapPlan& plan = P.plan;
    MapUnit at(unit, plan);
    PixelPlace mine(plan, V, from_here(int(threadIdx.x)));  // again: else it holds registers through the whole kernel
    int slot = mine.slot(plan), lane = mine.row - slot * plan.lanes;
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + mine.column;
    i = int(at.part) * plan.part_size, last = min(plan.positions, i + plan.part_size), i += lane;
    if (slot >= plan.images || image >= plan.shape.batch || channel >= plan.shape.channels) last = 0;
    mask = P.mask + image * plan.positions * plan.shape.channels + channel;
    dm = static_cast<const T*>(P.dm) + image * P.dm_stride_b + channel * P.dm_stride_c;
  }
  // Begins to copy the next window's mask, and its dm where there is one.
  template <class Masks, class Gradients>
  __device__ __forceinline__ void fill(const Masks& masks, const Gradients& gradients, int to) {
    const TapPlan& plan = P.plan;
    while (i >= last) {
      if (unit + gridDim.x >= plan.units) return;  // was the last
      unit += gridDim.x;
      enter();
    }
    int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
    masks.begin(to, 0, mask + int64_t(i) * plan.shape.channels);
    if (P.dm && P.dm_wide && 2 * w + 1 < plan.shape.width && 2 * h + 1 < plan.shape.height) gradients.begin(to, 0, dm + h * P.dm_stride_h + w * P.dm_stride_w);
    i += plan.lanes;
  }
};

template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kMapThreads, kWide ? 3 : 2) tap_pixels_backward(const __grid_constant__ TapBackwardParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);

  // This thread's place in a unit
  PixelPlace mine(plan, V, int(threadIdx.x));
  int slot = mine.slot(plan), lane = mine.row - slot * plan.lanes;

  // Loads run ahead: the copies of two windows are on their way while the thread works on a third
  constexpr bool kAhead = kPool && kWide;
  constexpr int kMaskBytes = kPool ? V : 8;
  CopyRing<1, 16> gradients(shared.rows() + kMapThreads * kTapRowWords);
  CopyRing<1, kMaskBytes> masks(shared.rows() + kMapThreads * kTapRowWords + gradients.kRingBytes / 4);
  TapGradientsAhead<T, V> ahead(P);
  auto fill = [&](int to) {
    if constexpr (kAhead) ahead.fill(masks, gradients, to);
  };
  RingOrder order;
  if constexpr (kAhead) order.begin(fill);

  LateArrival late(P.dshift != nullptr);
  for (uint32_t unit = blockIdx.x; unit < plan.units + late.behind(); unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + mine.column;
    TapGradient<T> gradient[W] = {};

    if (unit < plan.units && slot < plan.images && image < s.batch && channel < s.channels) {
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
        auto dm_of = [&](const MapUnit& of) {
          return static_cast<const T*>(P.dm) + (int64_t(of.group) * plan.images + slot) * P.dm_stride_b + (int64_t(of.slab) * plan.slab + mine.column) * P.dm_stride_c;
        };
        const T* dm = dm_of(at);  // not kept where it is read ahead
        for (int i = first + lane; i < last; i += plan.lanes) {
          int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
          bool right = 2 * w + 1 < s.width, below = 2 * h + 1 < s.height, complete = right && below;

          // Load
          Vector<uint8_t, V> bytes;
          int ready = 0;
          if constexpr (kAhead)
            ready = order.next(fill), bytes = masks.template read<Vector<uint8_t, V>>(ready, 0);
          else
            bytes = load_few_bytes<V>(mask + int64_t(i) * s.channels, count);
          uint32_t upstream[W] = {};
          if (P.dm && complete) {
            if (kAhead && P.dm_wide) {
              auto piece = gradients.template read<Vector<uint32_t, 4>>(ready, 0);
#pragma unroll
              for (int q = 0; q < W; ++q) upstream[q] = piece[q % 4];
            } else {
              const T* from = (kAhead ? dm_of(MapUnit(uint32_t(from_here(int(unit))), plan)) : dm) + h * P.dm_stride_h + w * P.dm_stride_w;
              if (P.dm_wide)
                load_whole(upstream, from, policy);
              else
                load_few(upstream, from, count, int(sizeof(T)), P.dm_stride_c);
            }
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
    late.learn(shared, unit, [&](uint32_t of) { return sum_arrivals(P, of); });
    float sums[V];
#pragma unroll
    for (int i = 0; i < V; ++i) sums[i] = gradient[i / kPer<T>].sum(i % kPer<T>);
    __syncthreads();
    bool arrived = late.last(shared);
    if (slot < plan.images) store_row(shared.rows() + mine.row * plan.slab + mine.column, sums);
    __syncthreads();
    finish_sums(P, unit, shared, late, arrived, plan.images * plan.lanes);
  }
  if constexpr (kAhead) wait_for_copies();
}

}  // namespace interflow
