// stage_tap_backward's kernels: du is written once, from dm, dp and the mask, and summed for d(shift) on the way.
//
//   du = passes * dp / (H W) + is the maximum * dm, summed in fp32 and rounded once; dshift = sum of du over B, H, W in fp32
//
// Units, threads and pieces as in stage_tap_fwd.cu. Because dp belongs to a whole map, d(shift) needs of each thread only how
// often it passed and the sum of the dm that did. Rows of sums meet in two levels: the block that arrives last among rows_at_once
// units adds theirs, and the last of these adds what came of it.
#include <algorithm>

#include "launch.h"
#include "stage_tap_access.cuh"
#include "stage_tap_sums.cuh"
#include "stage_tap_window.cuh"

namespace interflow {
namespace {

constexpr int kAtOnce = 4;  // bytes of the mask that are read before the first is used, where only the mean was taken

// A unit's sums, in shared.rows [count, slab], on their way to dshift.
__device__ __forceinline__ void finish_sums(const TapBackwardParams& P, const TapUnit& at, TapShared& shared, int count) {
  const TapPlan& plan = P.plan;
  int64_t channels = plan.shape.channels, first = int64_t(at.slab) * plan.slab;
  int these = int(min(int64_t(plan.slab), channels - first)), row = int(at.group) * plan.parts + int(at.part);
  sum_rows(shared, 1, count, plan.slab, [&](int, int c, float sum) {
    if (c < these) P.rows[row * channels + first + c] = sum;
  });

  // Twice at most: rows_at_once rows, then what came of all of these
  int groups = (P.row_count + P.rows_at_once - 1) / P.rows_at_once, group = row / P.rows_at_once;
  const float* rows = P.rows + int64_t(group) * P.rows_at_once * channels;
  int meeting = min(P.rows_at_once, P.row_count - group * P.rows_at_once);
  uint32_t* arrivals = P.arrivals + int64_t(group) * plan.slabs;
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    if (!arrives_last(shared, arrivals + at.slab, uint32_t(meeting))) return;
    bool last = level == 1 || groups == 1;
    float* to = (last ? P.dshift : P.sums + int64_t(group) * channels) + first;
    sum_published_rows(shared, rows + first, channels, meeting, these, [&](int c, float sum) { to[c] = sum; });
    if (last) return;
    rows = P.sums, meeting = groups, arrivals = P.arrivals + int64_t(groups) * plan.slabs;
  }
}

// --- NHWC --------------------------------------------------------------------------------------------------------------------
template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kTapThreads, kWide ? 3 : 2) tap_pixels_backward(const __grid_constant__ TapBackwardParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>;
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
          store_whole(p, d, policy);
        else
          store_few(p, d, count, P.access, policy);
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
        int64_t row_bytes = (s.channels + 7) / 8;
        const uint8_t* mask = P.mask + image * plan.positions * row_bytes + channel / 8;
        for (int i = first + lane; i < last; i += plan.lanes * kAtOnce) {
          uint32_t byte[kAtOnce];
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) byte[t] = i + t * plan.lanes < last ? mask[(i + t * plan.lanes) * row_bytes] : 0;
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            int pixel = i + t * plan.lanes;
            if (pixel >= last) break;
            uint32_t d[W];
#pragma unroll
            for (int q = 0; q < W; ++q) d[q] = gradient[q].element(spread_bits<T>(byte[t], q));
            store(du + pixel * s.channels, d);
          }
        }
      }
    }

    // Sum over the block
    if (!P.dshift) continue;
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows[row * plan.slab + column * V + i] = gradient[i / kPer<T>].sum(i % kPer<T>);
    finish_sums(P, at, shared, plan.images * plan.lanes);
  }
}

// --- NCHW ----------------------------------------------------------------------------------------------------------------------
template <class T, bool kPool, bool kWide>
__global__ void __launch_bounds__(kTapThreads, kWide ? 3 : 2) tap_planes_backward(const __grid_constant__ TapBackwardParams P) {
  constexpr int V = kTapVector<T, kPool>, W = V / kPer<T>;
  const TapPlan& plan = P.plan;
  const TapShape& s = plan.shape;
  TapShared& shared = *reinterpret_cast<TapShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);

  int plane = int(threadIdx.x) / plan.lanes, lane = int(threadIdx.x) - plane * plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    TapUnit at(unit, plan);
    int64_t image = at.group, channel = int64_t(at.slab) * plan.slab + plane;
    TapGradient<T> gradient = {};

    if (channel < s.channels) {
      float gp[kPer<T>] = {};
      if (P.dp) gp[0] = divided(P.dp[image * P.dp_stride_b + channel * P.dp_stride_c], plan.pixels, plan.mean);
      if constexpr (kPer<T> == 2) gp[1] = gp[0];
      gradient.start(gp);
      int64_t pixels = s.height * s.width;
      T* du = static_cast<T*>(P.du) + (image * s.channels + channel) * pixels;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);

      if constexpr (kPool) {
        int64_t windows_h = (s.height + 1) / 2, windows_w = (s.width + 1) / 2;
        const uint8_t* mask = P.mask + (image * s.channels + channel) * windows_h * windows_w;
        const T* dm = P.dm ? static_cast<const T*>(P.dm) + image * P.dm_stride_b + channel * P.dm_stride_c : nullptr;
        for (int tile = first + lane; tile < last; tile += plan.lanes) {
          int h = int(divide(uint32_t(tile), plan.row)), column = (tile - h * int(plan.row.divisor)) * V;
          int count = kWide ? V : int(min(int64_t(V), s.width - column));
          bool below = 2 * h + 1 < s.height;

          // Load: two words of windows
          Vector<uint8_t, V / 2> bytes;
          const uint8_t* from_mask = mask + h * windows_w + column / 2;
          if constexpr (kWide)
            bytes = load_stream<Vector<uint8_t, V / 2>>(from_mask, policy);
          else
            bytes = load_few_bytes<V / 2>(from_mask, (count + 1) / 2);
          uint32_t upstream[2] = {};
          if (dm && below) {
            const T* from = dm + h * P.dm_stride_h + column / 2 * P.dm_stride_w;
            if (P.dm_wide)
              load_whole(upstream, from, policy);
            else
              load_few(upstream, from, count / 2, int(sizeof(T)), P.dm_stride_w);
          }

          // Choose, and put neighbours of a row side by side
          uint32_t code[2], d[2][W];
          to_top_bytes<T>(bytes, code);
#pragma unroll
          for (int q = 0; q < 2; ++q) {
            uint32_t of_maximum = gradient.window(code[q], upstream[q]);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              uint32_t left = gradient.place(code[q], of_maximum, 2 * r), right = gradient.place(code[q], of_maximum, 2 * r + 1);
              if constexpr (kPer<T> == 2)
                d[r][2 * q] = permute_bytes<0x5410>(left, right), d[r][2 * q + 1] = permute_bytes<0x7632>(left, right);
              else
                d[r][2 * q] = left, d[r][2 * q + 1] = right;
            }
          }

          // Store
          T* corner = du + 2 * h * s.width + column;
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (r == 1 && !below) break;
            if constexpr (kWide)
              store_whole(corner + r * s.width, d[r], policy);
            else
              store_few(corner + r * s.width, d[r], count, P.access, policy);
          }
        }
      } else {
        const uint8_t* mask = P.mask + (image * s.channels + channel) * ((pixels + 7) / 8);
        for (int i = first + lane; i < last; i += plan.lanes * kAtOnce) {
          uint32_t byte[kAtOnce];
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) byte[t] = i + t * plan.lanes < last ? mask[i + t * plan.lanes] : 0;
#pragma unroll
          for (int t = 0; t < kAtOnce; ++t) {
            int run = i + t * plan.lanes;
            if (run >= last) break;
            uint32_t d[W];
#pragma unroll
            for (int q = 0; q < W; ++q) d[q] = gradient.element(spread_bits<T>(byte[t], q));
            if constexpr (kWide)
              store_whole(du + int64_t(run) * V, d, policy);
            else
              store_few(du + int64_t(run) * V, d, int(min(int64_t(V), pixels - int64_t(run) * V)), P.access, policy);
          }
        }
      }
    }

    // Sum over the plane's threads: a warp's by shuffles, the rest by rows
    if (!P.dshift) continue;
    float sum = gradient.sum(0);
    if constexpr (kPer<T> == 2) sum += gradient.sum(1);
    int together = min(plan.lanes, kWarp);
    for (int step = together / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    __syncthreads();
    if (lane % together == 0) shared.rows[lane / together * plan.slab + plane] = sum;
    finish_sums(P, at, shared, plan.lanes / together);
  }
}

template <class T, bool kPool, bool kWide>
cudaError_t launch_typed(const TapBackwardParams& P, cudaStream_t stream) {
  auto kernel = P.plan.shape.channels_last ? tap_pixels_backward<T, kPool, kWide> : tap_planes_backward<T, kPool, kWide>;
  cudaError_t error = cudaSuccess;
  int64_t resident = resident_blocks(kernel, kTapThreads, int(sizeof(TapShared)), &error);
  if (error != cudaSuccess) return error;
  return launch(kernel, {std::min(int64_t(P.plan.units), resident), kTapThreads, int(sizeof(TapShared)), stream}, P);
}

template <class T>
cudaError_t launch_for(const TapBackwardParams& P, cudaStream_t stream) {
  bool wide = P.access == 16;
  if (P.plan.max_pool) return wide ? launch_typed<T, true, true>(P, stream) : launch_typed<T, true, false>(P, stream);
  return wide ? launch_typed<T, false, true>(P, stream) : launch_typed<T, false, false>(P, stream);
}

}  // namespace

cudaError_t launch_tap_backward(const TapBackwardParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
