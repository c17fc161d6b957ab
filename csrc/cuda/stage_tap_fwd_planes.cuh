// stage_tap on NCHW maps, and on whatever has no stride 1. kWide, kMask: see stage_tap_fwd_pixels.cuh.
#pragma once
#include "stage_tap_fwd.cuh"

namespace interflow {

// All bits of those of the elements first, first + step, ... of a word that are less than count.
template <class T>
__device__ __forceinline__ uint32_t less_than(int first, int step, int count) {
  if constexpr (kPer<T> == 2)
    return (first < count ? 0xffffu : 0) | (first + step < count ? 0xffff0000u : 0);
  else
    return first < count ? ~0u : 0;
}

template <class T, bool kPool, bool kWide, bool kMask>
__global__ void __launch_bounds__(kTapThreads, kWide ? 3 : 2) tap_planes(const __grid_constant__ TapParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>, kAtOnce = kPool ? 2 : 16 / W;
  const TapPlan& plan = P.plan;
  const TapShape& s = plan.shape;
  TapShared& shared = *reinterpret_cast<TapShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool masked = kWide ? kMask : P.mask != nullptr;

  int plane = int(threadIdx.x) / plan.lanes, lane = int(threadIdx.x) - plane * plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    TapUnit at(unit, plan);
    int64_t image = at.group, channel = int64_t(at.slab) * plan.slab + plane;
    float sum = 0;

    if (channel < s.channels) {
      const T* u = static_cast<const T*>(P.u) + image * P.stride_b + channel * P.stride_c;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);
      float one[kPer<T>];
#pragma unroll
      for (int k = 0; k < kPer<T>; ++k) one[k] = P.shift ? load_as_float(P.shift, P.shift_dtype, channel * P.shift_stride) : -0.0f;
      uint32_t shift = Packed<T>::pack(one);

      if constexpr (kPool) {
        int64_t out_h = s.height / 2, out_w = s.width / 2, windows_h = (s.height + 1) / 2, windows_w = (s.width + 1) / 2;
        T* m = static_cast<T*>(P.m) + (image * s.channels + channel) * out_h * out_w;
        uint8_t* mask = masked ? P.mask + (image * s.channels + channel) * windows_h * windows_w : nullptr;
        // Tiles i, i + lanes, ...: all of them inside the map, or some outside
        auto tiles = [&](auto is_all, int i) {
          constexpr bool kAll = decltype(is_all)::value;

          // Load
          uint32_t x[kAtOnce][2][W];
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            int tile = i + t * plan.lanes, h = int(divide(uint32_t(tile), plan.row)), column = (tile - h * int(plan.row.divisor)) * V;
            const T* corner = u + 2 * h * P.stride_h + column * P.stride_w;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              if (!kAll && (tile >= last || 2 * h + r >= s.height))
#pragma unroll
                for (int q = 0; q < W; ++q) x[t][r][q] = 0;
              else if constexpr (kWide)
                load_whole(x[t][r], corner + r * P.stride_h, policy);
              else
                load_few(x[t][r], corner + r * P.stride_h, int(min(int64_t(V), s.width - column)), P.access, P.stride_w);
            }
          }

#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            int tile = i + t * plan.lanes, h = int(divide(uint32_t(tile), plan.row)), column = (tile - h * int(plan.row.divisor)) * V;
            if (!kAll && tile >= last) break;
            int count = kWide ? V : int(min(int64_t(V), s.width - column));
            bool below = kAll || 2 * h + 1 < s.height;

            // Rectify, sum, choose: two words of windows a tile
            uint32_t out[2];
            TapChoice choice[2] = {};
#pragma unroll
            for (int q = 0; q < 2; ++q) {
              TapWindow<T> window;
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                uint32_t a = x[t][j / 2][q * W / 2], b = x[t][j / 2][q * W / 2 + 1], place;
                if constexpr (kPer<T> == 2)
                  place = j % 2 ? permute_bytes<0x7632>(a, b) : permute_bytes<0x5410>(a, b);
                else
                  place = j % 2 ? b : a;
                uint32_t biased = Packed<T>::add(place, shift);
                if (j == 0) window.first = biased;
                window.v[j] = rectify<T>(biased);
                if (!kWide) window.v[j] &= less_than<T>(q * V / 2 + j % 2, 2, count);
                if (j >= 2 && !below) window.v[j] = 0;
              }
#pragma unroll
              for (int k = 0; k < kPer<T>; ++k) sum += window.sum(k);
              out[q] = window.maximum(masked, choice[q]);
            }

            // Store
            if (below) {
              T* to = m + h * out_w + column / 2;
              if constexpr (kWide)
                store_whole(to, out);
              else
                store_few(to, out, count / 2, P.m_access);
            }
            if (masked) {
              auto bytes = mask_bytes<T>(choice);
              if constexpr (!kAll)
#pragma unroll
                for (int k = 0; k < V / 2; ++k)
                  if (!below || 2 * k + 1 >= count) bytes[k] &= 0x0f;
              uint8_t* to = mask + h * windows_w + column / 2;
              if constexpr (kWide)
                store_stream(to, bytes, policy);
              else
                store_few_bytes(to, bytes, (count + 1) / 2, policy);
            }
          }
        };
        int inside = min(last, int(out_h) * int(plan.row.divisor));  // tiles behind have one row
        for (int i = first + lane; i < last; i += plan.lanes * kAtOnce) {
          if (kWide && i + (kAtOnce - 1) * plan.lanes < inside)
            tiles(std::bool_constant<kWide>{}, i);
          else
            tiles(std::false_type{}, i);
        }
      } else {
        int64_t pixels = s.height * s.width, plane_bytes = (pixels + 7) / 8;
        uint8_t* mask = masked ? P.mask + (image * s.channels + channel) * plane_bytes : nullptr;
        for (int i = first + lane; i < last; i += plan.lanes * kAtOnce) {
          // Load runs of eight
          uint32_t x[kAtOnce][W];
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            int run = i + j * plan.lanes;
            if (run >= last) break;
            if constexpr (kWide)
              load_whole(x[j], u + int64_t(run) * V, policy);
            else if (P.runs)
              load_few(x[j], u + int64_t(run) * V, int(min(int64_t(V), pixels - int64_t(run) * V)), P.access);
            else
              for (int q = 0; q < W; ++q) {
                x[j][q] = 0;
                for (int k = 0; k < kPer<T>; ++k) {
                  int64_t element = int64_t(run) * V + q * kPer<T> + k;
                  if (element >= pixels) break;
                  uint32_t h = divide(uint32_t(element), plan.row), w = uint32_t(element) - h * plan.row.divisor;
                  uint32_t single[1];
                  load_few(single, u + h * P.stride_h + w * P.stride_w, 1, int(sizeof(T)));
                  x[j][q] |= single[0] << (16 * k);
                }
              }
          }

          // Rectify, sum, store
#pragma unroll
          for (int j = 0; j < kAtOnce; ++j) {
            int run = i + j * plan.lanes;
            if (run >= last) break;
            uint32_t v[W];
#pragma unroll
            for (int q = 0; q < W; ++q) {
              v[q] = rectify<T>(Packed<T>::add(x[j][q], shift));
              if (!kWide) v[q] &= less_than<T>(q * kPer<T>, 1, int(min(int64_t(V), pixels - int64_t(run) * V)));
            }
#pragma unroll
            for (int q = 0; q < W; q += 2) {
              float left = Packed<T>::get(v[q], 0), right = Packed<T>::get(v[q + 1], 0);
              if constexpr (kPer<T> == 2) left += Packed<T>::get(v[q], 1), right += Packed<T>::get(v[q + 1], 1);
              sum += left + right;
            }
            if (masked) store_stream(mask + run, passing_bits<T>(v), policy);
          }
        }
      }
    }

    // Sum over the plane's threads: a warp's by shuffles, the rest by rows
    int together = min(plan.lanes, kWarp);
    for (int step = together / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    __syncthreads();
    if (lane % together == 0) shared.rows[lane / together * plan.slab + plane] = sum;
    finish_means(P, at, shared, plan.lanes / together);
  }
}

}  // namespace interflow
