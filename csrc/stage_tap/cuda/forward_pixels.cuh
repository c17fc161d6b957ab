// stage_tap on NHWC maps. kWide: 16-byte accesses everywhere. kMask, in wide kernels: whether the mask is wanted; the others ask.
#pragma once
#include "stage_tap/cuda/forward.cuh"

namespace interflow {

template <class T, bool kPool, bool kWide, bool kMask>
__global__ void __launch_bounds__(kMapThreads, kWide ? 3 : 2) tap_pixels(const __grid_constant__ TapParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>, kAtOnce = kPool ? 1 : 16 / W;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool masked = kWide ? kMask : P.mask != nullptr;

  // This thread's place in a unit
  int columns = plan.slab / V, column = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;  // row: of the sums
  int slot = row / plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + column * V;
    float sums[V] = {};

    if (slot < plan.images && image < s.batch && channel < s.channels) {
      int count = int(min(int64_t(V), s.channels - channel));
      auto load = [&](uint32_t (&x)[W], const T* p) {
        if constexpr (kWide)
          load_whole(x, p, policy);
        else
          load_few(x, p, count, P.access);
      };
      const T* u = static_cast<const T*>(P.u) + image * P.stride_b + channel;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size), lane = row - slot * plan.lanes;
      uint32_t shift[W];
      load_shift<T, V>(shift, P, channel, count);

      if constexpr (kPool) {
        int64_t out_w = s.width / 2;
        T* m = static_cast<T*>(P.m) + image * (s.height / 2) * out_w * s.channels + channel;
        uint8_t* mask = masked ? P.mask + image * plan.positions * s.channels + channel : nullptr;
        auto window = [&](auto is_complete, int i, int h, int w) {
          constexpr bool kComplete = decltype(is_complete)::value;
          bool right = kComplete || 2 * w + 1 < s.width, below = kComplete || 2 * h + 1 < s.height;

          // Load
          const T* corner = u + 2 * h * P.stride_h + 2 * w * P.stride_w;
          uint32_t x[4][W];
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (kComplete || ((right || j % 2 == 0) && (below || j < 2)))
              load(x[j], corner + j / 2 * P.stride_h + j % 2 * P.stride_w);
            else
#pragma unroll
              for (int q = 0; q < W; ++q) x[j][q] = 0;
          }

          // Rectify, sum, choose: as many words at a time as fill four bytes of the mask
          constexpr int kWords = 4 / kPer<T>;
          uint32_t out[W];
          Vector<uint8_t, V> bytes;
#pragma unroll
          for (int first_word = 0; first_word < W; first_word += kWords) {
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
              store_stream(to, bytes, policy);
            else
              store_few_bytes(to, bytes, count, policy);
          }
        };
        for (int i = first + lane; i < last; i += plan.lanes) {
          int h = int(divide(uint32_t(i), plan.row)), w = i - h * int(plan.row.divisor);
          if (kWide && 2 * w + 1 < s.width && 2 * h + 1 < s.height)
            window(std::bool_constant<kWide>{}, i, h, w);
          else
            window(std::false_type{}, i, h, w);
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
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows()[row * plan.slab + column * V + i] = sums[i];
    __syncthreads();
    finish_means<false>(P, at, shared, plan.lanes);
  }
}

}  // namespace interflow
