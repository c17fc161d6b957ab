// stage_tap on NHWC maps. kWide: 16-byte accesses everywhere. kMask, in wide kernels: whether the mask is wanted; the others ask.
#pragma once
#include "common/cuda/ring.cuh"
#include "stage_tap/cuda/forward.cuh"

namespace interflow {

// The windows of a thread in the order of its units, whose loads run ahead of the thread.
template <class T>
struct TapWindowsAhead {
  const TapParams& P;
  uint32_t unit;
  const T* u;
  int i = 0, last = 0;

  __device__ __forceinline__ explicit TapWindowsAhead(const TapParams& P) : P(P), unit(blockIdx.x) { enter(); }
  __device__ __forceinline__ void enter() {
    const TapPlan& plan = P.plan;
    MapUnit at(unit, plan);
    PixelPlace mine(plan, kTapVector<T, true>, from_here(int(threadIdx.x)));  // again: else it holds registers through the whole kernel
    int slot = mine.slot(plan), lane = mine.row - slot * plan.lanes;
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + mine.column;
    i = int(at.part) * plan.part_size, last = min(plan.positions, i + plan.part_size), i += lane;
    if (slot >= plan.images || image >= plan.shape.batch || channel >= plan.shape.channels) last = 0;
    u = static_cast<const T*>(P.u) + image * P.stride_b + channel;
  }
  // Begins to copy the next window's places, those inside the map.
  template <class Ring>
  __device__ __forceinline__ void fill(const Ring& ring, int to) {
    const TapPlan& plan = P.plan;
    while (i >= last) {
      if (unit + gridDim.x >= plan.units) return;  // was the last
      unit += gridDim.x;
      enter();
    }
    int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
    bool right = 2 * w + 1 < plan.shape.width, below = 2 * h + 1 < plan.shape.height;
    const T* corner = u + 2 * h * P.stride_h + 2 * w * P.stride_w;
    ring.begin(to, 0, corner);
    if (right) ring.begin(to, 1, corner + P.stride_w);
    if (below) ring.begin(to, 2, corner + P.stride_h);
    if (right && below) ring.begin(to, 3, corner + P.stride_h + P.stride_w);
    i += plan.lanes;
  }
};

template <class T, bool kPool, bool kWide, bool kMask>
__global__ void __launch_bounds__(kMapThreads, kWide ? 3 : 2) tap_pixels(const __grid_constant__ TapParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>, kAtOnce = kPool ? 1 : 16 / W;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool masked = kWide ? kMask : P.mask != nullptr;

  // This thread's place in a unit
  PixelPlace mine(plan, V, int(threadIdx.x));
  int slot = mine.slot(plan), lane = mine.row - slot * plan.lanes;

  // Loads of windows run ahead: the copies of two are on their way while the thread works on a third
  constexpr bool kAhead = kPool && kWide;
  CopyRing<4, 16> ring(shared.rows() + kMapThreads * kTapRowWords);
  TapWindowsAhead<T> ahead(P);
  auto fill = [&](int to) {
    if constexpr (kAhead) ahead.fill(ring, to);
  };
  RingOrder order;
  if constexpr (kAhead) order.begin(fill);

  uint32_t shift[W], shift_slab = ~0u;
  LateArrival late(plan.parts > 1);
  for (uint32_t unit = blockIdx.x; unit < plan.units + late.behind(); unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + mine.column;
    float sums[V] = {};

    if (unit < plan.units && slot < plan.images && image < s.batch && channel < s.channels) {
      int count = int(min(int64_t(V), s.channels - channel));
      auto load = [&](uint32_t (&x)[W], const T* p) {
        if constexpr (kWide)
          load_whole(x, p, policy);
        else
          load_few(x, p, count, P.access);
      };
      const T* u = static_cast<const T*>(P.u) + image * P.stride_b + channel;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);
      if (at.slab != shift_slab) load_shift<T, V>(shift, P, channel, count), shift_slab = at.slab;

      if constexpr (kPool) {
        int64_t out_w = s.width / 2;
        T* m = static_cast<T*>(P.m) + image * (s.height / 2) * out_w * s.channels + channel;
        uint8_t* mask = masked ? P.mask + image * plan.positions * s.channels + channel : nullptr;
        auto window = [&](auto is_complete, int ready, int i, int h, int w) {
          constexpr bool kComplete = decltype(is_complete)::value;
          bool right = kComplete || 2 * w + 1 < s.width, below = kComplete || 2 * h + 1 < s.height;

          // Load, or wait for what was loaded ahead
          uint32_t x[4][W];
          if constexpr (!kAhead) {
            const T* corner = u + 2 * h * P.stride_h + 2 * w * P.stride_w;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              if ((right || j % 2 == 0) && (below || j < 2))
                load(x[j], corner + j / 2 * P.stride_h + j % 2 * P.stride_w);
              else
#pragma unroll
                for (int q = 0; q < W; ++q) x[j][q] = 0;
            }
          }

          // Rectify, sum, choose: as many words at a time as fill four bytes of the mask
          constexpr int kWords = 4 / kPer<T>;
          uint32_t out[W];
          Vector<uint8_t, V> bytes;
#pragma unroll
          for (int first_word = 0; first_word < W; first_word += kWords) {
            if constexpr (kAhead) {  // only these words: the others wait in shared memory
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                Vector<uint32_t, kWords> words{};
                if (kComplete || ((right || j % 2 == 0) && (below || j < 2))) words = ring.template read<Vector<uint32_t, kWords>>(ready, j, first_word);
#pragma unroll
                for (int k = 0; k < kWords; ++k) x[j][first_word + k] = words[k];
              }
            }
            TapChoice choice[kWords] = {};
#pragma unroll
            for (int of_word = 0; of_word < kWords; ++of_word) {
              int q = first_word + of_word;
              TapWindow<T> window;
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                uint32_t biased = Packed<T>::add(x[j][q], shift[q]);
                if (j == 0) window.first = biased;
                window.v[j] = rectify<T>(biased);
                if (!kComplete && !((right || j % 2 == 0) && (below || j < 2))) window.v[j] = 0;
              }
#pragma unroll
              for (int k = 0; k < kPer<T>; ++k) sums[q * kPer<T> + k] += window.sum(k);
              out[q] = window.maximum(masked, choice[of_word]);
            }
            auto four = mask_bytes<T>(choice);
            memcpy(&bytes[first_word * kPer<T>], &four, 4);
          }

          // Store
          if (right && below) {
            T* to = m + (h * out_w + w) * s.channels;
            if constexpr (kWide)
              store_whole(to, out);
            else
              store_few(to, out, count, P.m_access);
          }
          if (masked) {
            if (!(right && below))
#pragma unroll
              for (int k = 0; k < V; ++k) bytes[k] &= 0x0f;
            uint8_t* to = mask + int64_t(i) * s.channels;
            if constexpr (kWide)
              store_stream(to, bytes, cache_policy(from_here(P.stream)));  // made here, it holds no registers
            else
              store_few_bytes(to, bytes, count, policy);
          }
        };
        for (int i = first + lane; i < last; i += plan.lanes) {
          int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
          int ready = kAhead ? order.next(fill) : 0;
          if (kAhead && 2 * w + 1 < s.width && 2 * h + 1 < s.height)
            window(std::bool_constant<kAhead>{}, ready, i, h, w);
          else
            window(std::false_type{}, ready, i, h, w);
        }
      } else {
        int64_t row_bytes = (s.channels + 7) / 8;
        uint8_t* mask = masked ? P.mask + image * plan.positions * row_bytes + channel / 8 : nullptr;
        for (int i = first + lane; i < last; i += plan.lanes * kAtOnce) {
          // Load
          uint32_t x[kAtOnce][W];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            int pixel = i + j * plan.lanes, h = int(divide(uint32_t(pixel), plan.row)), w = pixel - h * int(plan.row.divisor);
            if (pixel < last) load(x[j], u + h * P.stride_h + w * P.stride_w);
          }

          // Rectify, sum, store
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            int pixel = i + j * plan.lanes;
            if (j > 0 && pixel >= last) break;
            uint32_t v[W];
#pragma unroll
            for (int q = 0; q < W; ++q) {
              v[q] = rectify<T>(Packed<T>::add(x[j][q], shift[q]));
              if (!kWide && q * kPer<T> >= count) v[q] = 0;
              if (!kWide && kPer<T> == 2 && q * 2 + 1 == count) v[q] &= 0xffff;
#pragma unroll
              for (int k = 0; k < kPer<T>; ++k) sums[q * kPer<T> + k] += Packed<T>::get(v[q], k);
            }
            if (masked) store_stream(mask + pixel * row_bytes, passing_bits<T>(v), policy);
          }
        }
      }
    }

    // Sum over the block, when nobody reads the last unit's sums any more
    late.learn(shared, unit, [&](uint32_t of) { return mean_arrivals(P, of); });
    __syncthreads();
    bool arrived = late.last(shared);
    PixelPlace again(plan, V, from_here(int(threadIdx.x)));  // not kept through the windows
    if (again.slot(plan) < plan.images) store_row(shared.rows() + again.row * plan.slab + again.column, sums);
    __syncthreads();
    finish_means<false>(P, unit, shared, late, arrived, plan.lanes);
  }
  if constexpr (kAhead) wait_for_copies();
}

}  // namespace interflow
