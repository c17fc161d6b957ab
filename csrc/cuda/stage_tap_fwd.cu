// stage_tap's kernels: one read of u gives m, the mask and p.
//
//   v = relu(u + shift), each step rounded to u's dtype; m = max_pool2d(v, 2, 2); p = mean of v over H, W, summed in fp32
//
// One kernel for each layout: NHWC a thread takes 16 bytes of channels of a window, so four 16-byte loads before the first use,
// and keeps its channels' sums; NCHW it takes tiles of two rows, two at a time. Sums go through shared memory, and over the parts
// of a map through global memory to the block that arrives last: docs/decisions.md.
#include <algorithm>
#include <type_traits>

#include "launch.h"
#include "stage_tap_access.cuh"
#include "stage_tap_sums.cuh"
#include "stage_tap_window.cuh"

namespace interflow {
namespace {

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

// A unit's sums, in shared.rows [images, count, slab], become p, or one of the parts that the last of them adds up.
__device__ __forceinline__ void finish_means(const TapParams& P, const TapUnit& at, TapShared& shared, int count) {
  const TapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab, image = int64_t(at.group) * plan.images;
  sum_rows(shared, plan.images, count, plan.slab, [&](int slot, int c, float sum) {
    if (image + slot >= plan.shape.batch || first + c >= channels) return;
    if (plan.parts == 1)
      P.p[(image + slot) * channels + first + c] = sum * plan.mean;
    else
      P.partial[(image * plan.parts + at.part) * channels + first + c] = sum;
  });
  if (plan.parts > 1 && arrives_last(shared, P.arrivals + image * plan.slabs + at.slab, uint32_t(plan.parts)))
    sum_published_rows(shared, P.partial + image * plan.parts * channels + first, channels, plan.parts, int(min(int64_t(plan.slab), channels - first)),
                       [&](int c, float sum) { P.p[image * channels + first + c] = sum * plan.mean; });
}

// --- NHWC --------------------------------------------------------------------------------------------------------------------
template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kTapThreads, kWide ? 3 : 2) tap_pixels(const __grid_constant__ TapParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>, kAtOnce = kPool ? 1 : 16 / W;
  const TapPlan& plan = P.plan;
  const TapShape& s = plan.shape;
  TapShared& shared = *reinterpret_cast<TapShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);

  // This thread's place in a unit
  int columns = plan.slab / V, column = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;  // row: of the sums
  int slot = row / plan.lanes, lane = row - slot * plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    TapUnit at(unit, plan);
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
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);
      uint32_t shift[W];
      load_shift<T, V>(shift, P, channel, count);

      if constexpr (kPool) {
        int64_t out_w = s.width / 2;
        T* m = static_cast<T*>(P.m) + image * (s.height / 2) * out_w * s.channels + channel;
        uint8_t* mask = P.mask ? P.mask + image * plan.positions * s.channels + channel : nullptr;
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
              out[q] = window.maximum(mask != nullptr, choice[of_word]);
            }
            auto four = mask_bytes<T>(choice);
            memcpy(&bytes[first_word * kPer<T>], &four, 4);
          }

          // Store
          if constexpr (kComplete) {
            T* to = m + (h * out_w + w) * s.channels;
            if constexpr (kWide)
              store_whole(to, out, policy);
            else
              store_few(to, out, count, P.m_access, policy);
          }
          if (mask) {
            if constexpr (!kComplete)
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
          if (2 * w + 1 < s.width && 2 * h + 1 < s.height)
            window(std::true_type{}, i, h, w);
          else
            window(std::false_type{}, i, h, w);
        }
      } else {
        int64_t row_bytes = (s.channels + 7) / 8;
        uint8_t* mask = P.mask ? P.mask + image * plan.positions * row_bytes + channel / 8 : nullptr;
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
            if (pixel >= last) break;
            uint32_t v[W];
#pragma unroll
            for (int q = 0; q < W; ++q) {
              v[q] = rectify<T>(Packed<T>::add(x[j][q], shift[q]));
              if (!kWide && q * kPer<T> >= count) v[q] = 0;
              if (!kWide && kPer<T> == 2 && q * 2 + 1 == count) v[q] &= 0xffff;
#pragma unroll
              for (int k = 0; k < kPer<T>; ++k) sums[q * kPer<T> + k] += Packed<T>::get(v[q], k);
            }
            if (mask) store_stream(mask + pixel * row_bytes, passing_bits<T>(v), policy);
          }
        }
      }
    }

    // Sum over the block
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows[row * plan.slab + column * V + i] = sums[i];
    finish_means(P, at, shared, plan.lanes);
  }
}

// --- NCHW, and whatever has no stride 1 -----------------------------------------------------------------------------------------
// All bits of those of the elements first, first + step, ... of a word that are less than count.
template <class T>
__device__ __forceinline__ uint32_t less_than(int first, int step, int count) {
  if constexpr (kPer<T> == 2)
    return (first < count ? 0xffffu : 0) | (first + step < count ? 0xffff0000u : 0);
  else
    return first < count ? ~0u : 0;
}

template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kTapThreads, kWide ? 3 : 2) tap_planes(const __grid_constant__ TapParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>, kAtOnce = kPool ? 2 : 16 / W;
  const TapPlan& plan = P.plan;
  const TapShape& s = plan.shape;
  TapShared& shared = *reinterpret_cast<TapShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);

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
        uint8_t* mask = P.mask ? P.mask + (image * s.channels + channel) * windows_h * windows_w : nullptr;
        // Tiles i, i + lanes, ...: all of them inside the map, or some outside
        auto tiles = [&](auto is_all, int i) {
          constexpr bool kAll = kWide && decltype(is_all)::value;

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
              out[q] = window.maximum(mask != nullptr, choice[q]);
            }

            // Store
            if (below) {
              T* to = m + h * out_w + column / 2;
              if constexpr (kWide)
                store_whole(to, out, policy);
              else
                store_few(to, out, count / 2, P.m_access, policy);
            }
            if (mask) {
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
          if (i + (kAtOnce - 1) * plan.lanes < inside)
            tiles(std::true_type{}, i);
          else
            tiles(std::false_type{}, i);
        }
      } else {
        int64_t pixels = s.height * s.width, plane_bytes = (pixels + 7) / 8;
        uint8_t* mask = P.mask ? P.mask + (image * s.channels + channel) * plane_bytes : nullptr;
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
            if (mask) store_stream(mask + run, passing_bits<T>(v), policy);
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

template <class T, bool kPool, bool kWide>
cudaError_t launch_typed(const TapParams& P, cudaStream_t stream) {
  auto kernel = P.plan.shape.channels_last ? tap_pixels<T, kPool, kWide> : tap_planes<T, kPool, kWide>;
  cudaError_t error = cudaSuccess;
  int64_t resident = resident_blocks(kernel, kTapThreads, int(sizeof(TapShared)), &error);
  if (error != cudaSuccess) return error;
  return launch(kernel, {std::min(int64_t(P.plan.units), resident), kTapThreads, int(sizeof(TapShared)), stream}, P);
}

template <class T>
cudaError_t launch_for(const TapParams& P, cudaStream_t stream) {
  bool wide = P.access == 16;
  if (P.plan.max_pool) return wide ? launch_typed<T, true, true>(P, stream) : launch_typed<T, true, false>(P, stream);
  return wide ? launch_typed<T, false, true>(P, stream) : launch_typed<T, false, false>(P, stream);
}

}  // namespace

cudaError_t launch_tap(const TapParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
