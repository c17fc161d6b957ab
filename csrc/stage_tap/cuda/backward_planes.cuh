// stage_tap_backward on NCHW maps, and on whatever has no stride 1.
#pragma once
#include "stage_tap/cuda/backward.cuh"
#include "stage_tap/cuda/staging.cuh"
#include "stage_tap/cuda/tile.cuh"

namespace interflow {

// One plane of du, its mask, dm (where there is one) and how far dm's rows and columns lie apart; or the places of all these in shared memory.
template <class T>
struct TapPlaneBackward {
  T* du;
  const uint8_t* mask;
  const T* dm;
  bool has_dm;
  int64_t dm_stride_h, dm_stride_w;
  uint64_t policy;
};

// --- 2x2 windows -------------------------------------------------------------------------------------------------------------
// A thread's tiles, du by 16 bytes and the mask at once.
template <class T>
__device__ __forceinline__ void place_wide_tiles(const TapPlaneBackward<T>& plane, const TapPlan& plan, int first, int last, bool dm_wide,
                                                 TapGradient<T>& gradient) {
  constexpr int kAtOnce = 2;
  int width = int(plan.shape.width), step = plan.lanes * kTileWindows<T>, complete = int(plan.shape.height / 2 * plan.row.divisor);
  auto tiles = [&](auto is_wide) {
    constexpr bool kDmWide = decltype(is_wide)::value;  // a branch between the loads would make the compiler wait for the first
    for (int window = first; window < last; window += kAtOnce * step) {
      // Load
      Words<int(sizeof(TileBytes<T>))> codes[kAtOnce];
      Words<8> upstream[kAtOnce] = {};
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        int at = window + t * step, h = int(divide(uint32_t(at), plan.row)), w = at - h * int(plan.row.divisor);
        codes[t] = load_stream_if<int(sizeof(TileBytes<T>))>(at < last, plane.mask + at, plane.policy);
        if constexpr (kDmWide) upstream[t] = load_stream_if<8>(at < min(last, complete), plane.dm + h * plane.dm_stride_h + w * plane.dm_stride_w, plane.policy);
      }
#pragma unroll
      for (int t = 0; t < kAtOnce; ++t) {
        int at = window + t * step, h = int(divide(uint32_t(at), plan.row)), w = at - h * int(plan.row.divisor);
        if (t > 0 && at >= last) break;
        bool below = at < complete;
        uint32_t dm[2] = {upstream[t].at[0], upstream[t].at[1]};
        if constexpr (!kDmWide)
          if (plane.has_dm && below) load_few(dm, plane.dm + h * plane.dm_stride_h + w * plane.dm_stride_w, kTileWindows<T>, int(sizeof(T)), plane.dm_stride_w);
        TileBytes<T> bytes;
        memcpy(&bytes, &codes[t], sizeof bytes);

        // Choose, store
        uint32_t d[2][kTileWords];
        place_tile(d, bytes, dm, gradient);
        T* corner = plane.du + int64_t(2 * h) * width + 2 * w;
        store_whole(corner, d[0]);
        if (below) store_whole(corner + width, d[1]);
      }
    }
  };
  dm_wide && plane.has_dm ? tiles(std::true_type{}) : tiles(std::false_type{});
}

// The same window by window. access: bytes that may be written at once, where rows are as long.
template <class T, bool kStaged>
__device__ __forceinline__ void place_tiles(const TapPlaneBackward<T>& plane, const TapPlan& plan, int first, int last, int access, TapGradient<T>& gradient) {
  int height = int(plan.shape.height), width = int(plan.shape.width), odd = width % 2;  // m has as many windows fewer in a row
  int together = windows_together(access, width, plane.dm, plane.mask);
  int whole = together ? min(last, height / 2 * int(plan.row.divisor)) : 0;  // windows before have all four elements
  auto tile = [&](auto windows_at_once, int window) {
    constexpr int kTogether = decltype(windows_at_once)::value, kStep = kTogether == 0 ? 1 : kTogether;
    constexpr bool kWhole = kTogether > 0;

    // Load
    TileBytes<T> bytes{};
    uint32_t dm[2] = {};
    walk_tile<T, kStep>(window, last, height, width, plan.row, [&](int i, int h, int w, uint32_t inside) {
      if constexpr (kTogether == 2) {
        auto two = *reinterpret_cast<const Vector<uint8_t, 2>*>(plane.mask + window + i);
        bytes[i] = two[0], bytes[i + 1] = two[1];
      } else if (kWhole || inside) {
        bytes[i] = plane.mask[window + i];
      }
      if (!plane.has_dm || !(kWhole || inside == 15)) return;
      if constexpr (kTogether == 2)
        dm[i / 2] = *reinterpret_cast<const uint32_t*>(plane.dm + window + i);
      else if constexpr (kStaged)
        set_element<T>(dm, i, reinterpret_cast<const Bits<T>*>(plane.dm)[window + i - h * odd]);
      else
        set_element<T>(dm, i, load_cached<Bits<T>>(plane.dm + h * plane.dm_stride_h + w * plane.dm_stride_w));
    });

    // Choose, store
    uint32_t d[2][kTileWords];
    place_tile(d, bytes, dm, gradient);
    walk_tile<T, kStep>(window, last, height, width, plan.row, [&](int i, int h, int w, uint32_t inside) {
      T* corner = plane.du + (kStaged ? 2 * h * width : int64_t(2 * h) * width) + 2 * w;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kWhole) {
          const uint32_t* words = d[r] + i * 2 / kPer<T>;
          if constexpr (2 * kStep / kPer<T> == 2)
            *reinterpret_cast<uint64_t*>(corner + r * width) = uint64_t(words[1]) << 32 | words[0];  // as one number: else the compiler stores two
          else
            *reinterpret_cast<uint32_t*>(corner + r * width) = words[0];
        } else {
#pragma unroll
          for (int c = 0; c < 2; ++c)
            if (inside >> (2 * r + c) & 1) reinterpret_cast<Bits<T>*>(corner)[r * width + c] = Bits<T>(element_of<T>(d[r], 2 * i + c));
        }
      }
    });
  };
  for (int i = first; i < last; i += plan.lanes * kTileWindows<T>) {
    if (i + kTileWindows<T> > whole)
      tile(std::integral_constant<int, 0>{}, i);
    else if (kStaged && sizeof(T) == 2 && together == 2)
      tile(std::integral_constant<int, sizeof(T) == 2 ? 2 : 1>{}, i);
    else
      tile(std::integral_constant<int, 1>{}, i);
  }
}

// --- the mean alone ------------------------------------------------------------------------------------------------------------
// A thread's pieces of eight elements, `access` bytes at a time where not by 16.
template <class T, bool kWide, bool kStaged>
__device__ __forceinline__ void place_pieces(const TapPlaneBackward<T>& plane, const TapPlan& plan, int first, int last, int access, TapGradient<T>& gradient) {
  constexpr int V = kTapVector<T, false>, W = V / kPer<T>;
  int64_t pixels = pixels_of(plan.shape);
  for (int i = first; i < last; i += plan.lanes * kMaskAtOnce) {
    uint32_t byte[kMaskAtOnce];
#pragma unroll
    for (int t = 0; t < kMaskAtOnce; ++t) {
      if constexpr (kStaged)
        byte[t] = i + t * plan.lanes < last ? plane.mask[i + t * plan.lanes] : 0;
      else
        byte[t] = load_stream_if<1>(i + t * plan.lanes < last, plane.mask + (i + t * plan.lanes), plane.policy).at[0];
    }
#pragma unroll
    for (int t = 0; t < kMaskAtOnce; ++t) {
      int piece = i + t * plan.lanes;
      if (t > 0 && piece >= last) break;
      uint32_t d[W];
#pragma unroll
      for (int q = 0; q < W; ++q) d[q] = gradient.element(spread_bits<T>(byte[t], q));
      if constexpr (kWide)
        store_whole(plane.du + int64_t(piece) * V, d);
      else
        store_few(plane.du + int64_t(piece) * V, d, int(min(int64_t(V), pixels - int64_t(piece) * V)), access);
    }
  }
}

// --- units -------------------------------------------------------------------------------------------------------------------
// Brings what a unit of du is made of into shared memory, or begins to: the mask, dm (by elements where its planes do not follow each other), dp.
template <class T, bool kPool>
__device__ __forceinline__ void start_unit(const TapBackwardParams& P, const TapBuffers& buffers, float* dp, uint32_t unit) {
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  const TapRuns& most = plan.staged;
  Team of_mask(0, 2), of_dm(2, 2);
  if (unit >= plan.units || !(of_mask.has_me() || of_dm.has_me())) return;
  MapUnit at(unit, plan);
  TapExtent extent(at, plan);
  int out_w = int(s.width / 2), out = int(s.height / 2) * out_w;
  int64_t image = at.group, channels = s.channels, masks = channels * plan.positions;
  if (of_mask.has_me()) {
    start_run(of_mask, buffers.mask, P.mask + image * masks + extent.begin(most.mask, plan.positions), extent.count(most.mask, plan.positions), P.mask,
              P.mask + s.batch * masks);
    if (P.dp)
#pragma unroll 1
      for (int plane = of_mask.thread; plane < extent.planes; plane += of_mask.threads)
        copy_async<4>(dp + plane, P.dp + image * P.dp_stride_b + (extent.channel + plane) * P.dp_stride_c);
  } else if (kPool && P.dm && P.dm_dense) {
    const T* dm = static_cast<const T*>(P.dm) + image * P.dm_stride_b;
    start_run(of_dm, buffers.m, dm + extent.begin(most.m, out), extent.count(most.m, out), dm, dm + channels * out);
  } else if (kPool && P.dm) {
    const T* dm = static_cast<const T*>(P.dm) + image * P.dm_stride_b + extent.channel * P.dm_stride_c;
#pragma unroll 4
    for (int i = of_dm.thread; i < extent.count(most.m, out); i += of_dm.threads) {
      int element = extent.skipped(most.m) + i, plane = element / out, h = (element - plane * out) / out_w, w = element - plane * out - h * out_w;
      reinterpret_cast<T*>(buffers.m)[i] = dm[plane * P.dm_stride_c + h * P.dm_stride_h + w * P.dm_stride_w];
    }
  }
}

// Writes a unit of du from there, by the other warps.
template <class T>
__device__ __forceinline__ void store_unit(const TapBackwardParams& P, const TapBuffers& buffers, uint32_t unit) {
  const TapPlan& plan = P.plan;
  Team team(4, 4);
  if (!team.has_me()) return;
  MapUnit at(unit, plan);
  TapExtent extent(at, plan);
  int pixels = int(pixels_of(plan.shape)), most = plan.staged.u;
  store_run(team, static_cast<T*>(P.du) + int64_t(at.group) * plan.shape.channels * pixels + extent.begin(most, pixels), buffers.u, extent.count(most, pixels),
            [](char* p, const Vector<uint32_t, 4>& chunk) { store_chunk(p, chunk); });
}

template <class T>
inline int tap_planes_backward_shared(const TapPlan& plan, bool staged) {
  return staged ? tap_shared_bytes((plan.lanes + 1) * plan.slab, &plan.staged, sizeof(T)) : tap_shared_bytes(plan.lanes * plan.slab);
}

template <class T, bool kPool, TapPath kPath>
__global__ void __launch_bounds__(kMapThreads, kPath == TapPath::Narrow ? 2 : 3)
    tap_planes_backward(const __grid_constant__ TapBackwardParams P) {
  constexpr bool kStaged = kPath == TapPath::Staged;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  float* dp = shared.rows() + plan.lanes * plan.slab;  // of the unit's planes, where staged
  TapBuffers buffers(shared, (plan.lanes + 1) * plan.slab, plan.staged, sizeof(T));
  uint64_t policy = cache_policy(P.stream);

  // Several planes at once, each by its threads
  int at_once = kMapThreads / plan.lanes, place = int(threadIdx.x) / plan.lanes, lane = int(threadIdx.x) - place * plan.lanes;
  if constexpr (kStaged) start_unit<T, kPool>(P, buffers, dp, blockIdx.x);

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    TapExtent extent(at, plan);
    int64_t image = at.group;
    int out = int(s.height / 2) * int(s.width / 2), pixels = int(pixels_of(s));
    T* du = static_cast<T*>(P.du) + image * s.channels * pixels_of(s);
    const uint8_t* mask = P.mask + image * s.channels * plan.positions;
    const T* dm = static_cast<const T*>(P.dm) + image * P.dm_stride_b;

    auto sum_of_plane = [&](int plane) {
      if (plane >= extent.planes) return 0.0f;
      int64_t channel = extent.channel + plane;
      TapPlaneBackward<T> to{du + channel * pixels, mask + channel * plan.positions, dm + channel * P.dm_stride_c, P.dm != nullptr, P.dm_stride_h,
                             P.dm_stride_w, policy};
      int access = P.access, first = extent.first + lane * (kPool ? kTileWindows<T> : 1);
      float gp[kPer<T>] = {};
      if constexpr (kStaged) {
        const TapRuns& most = plan.staged;
        T* copy = run_in(buffers.u, du, extent.begin(most.u, pixels));
        to.du = copy + plane * pixels - extent.skipped(most.u), access = alignment_of(copy, pixels * int(sizeof(T)));
        to.mask = run_in(buffers.mask, mask, extent.begin(most.mask, plan.positions)) + plane * plan.positions - extent.first;
        to.dm = run_in(buffers.m, P.dm_dense ? dm : nullptr, P.dm_dense ? extent.begin(most.m, out) : 0) + plane * out - extent.skipped(most.m);
        if (P.dp) gp[0] = divided(dp[plane], plan.pixels, plan.mean);
      } else if (P.dp) {
        gp[0] = divided(P.dp[image * P.dp_stride_b + channel * P.dp_stride_c], plan.pixels, plan.mean);
      }
      if constexpr (kPer<T> == 2) gp[1] = gp[0];
      TapGradient<T> gradient = {};
      gradient.start(gp);
      if constexpr (kPool && kPath == TapPath::Wide)
        place_wide_tiles(to, plan, first, extent.last, P.dm_wide, gradient);
      else if constexpr (kPool)
        place_tiles<T, kStaged>(to, plan, first, extent.last, access, gradient);
      else
        place_pieces<T, kPath == TapPath::Wide, kStaged>(to, plan, first, extent.last, access, gradient);
      float sum = gradient.sum(0);
      if constexpr (kPer<T> == 2) sum += gradient.sum(1);
      return sum;
    };

    if constexpr (kPath == TapPath::Wide) {
      float sum = sum_of_plane(place);
      if (!P.dshift) continue;
      __syncthreads();  // nobody reads the last unit's sums any more
      shared.rows()[lane * plan.slab + place] = sum;
    } else {
      if constexpr (kStaged) wait_for_copies();
      __syncthreads();  // the unit is there, and nobody reads anything of the last one any more
      if (place < at_once)
        for (int plane = place; plane < plan.slab; plane += at_once) shared.rows()[lane * plan.slab + plane] = sum_of_plane(plane);
    }
    __syncthreads();  // sums and du are complete, and nobody reads dm, dp and the mask any more
    if constexpr (kStaged) {
      start_unit<T, kPool>(P, buffers, dp, unit + gridDim.x);
      store_unit<T>(P, buffers, uint32_t(from_here(int(unit))));
    }
    if (P.dshift) finish_sums(P, MapUnit(uint32_t(from_here(int(unit))), plan), shared, plan.lanes);
  }
}

}  // namespace interflow
