// stage_tap on NCHW maps, and on whatever has no stride 1. kMask, on the wide path: whether the mask is wanted; the others ask.
#pragma once
#include "stage_tap/cuda/forward.cuh"
#include "stage_tap/cuda/staging.cuh"
#include "stage_tap/cuda/tile.cuh"

namespace interflow {

// One plane, or its copy in shared memory: its first elements, how far its rows and columns lie apart; what of m and the mask is its.
template <class T, TapPath kPath>
struct TapPlane {
  using Step = std::conditional_t<kPath == TapPath::Staged, int, int64_t>;
  const T* u;
  Step stride_h, stride_w;
  T* m;
  uint8_t* mask;   // null: not wanted
  uint32_t shift;  // on u's grid in all elements of a word
  uint64_t policy;

  template <class Chunk>
  __device__ __forceinline__ Chunk read(const T* p) const {
    if constexpr (kPath == TapPath::Staged)
      return *reinterpret_cast<const Chunk*>(p);
    else
      return load_cached<Chunk>(p);
  }
  template <class Bytes>
  __device__ __forceinline__ void write_mask(int i, const Bytes& bytes) const {
    if constexpr (kPath == TapPath::Staged)
      *reinterpret_cast<Bytes*>(mask + i) = bytes;
    else
      store_stream(mask + i, bytes, policy);
  }
};

// --- 2x2 windows -------------------------------------------------------------------------------------------------------------
// The sum of v over a thread's tiles, by 16 bytes, two tiles at a time.
template <class T, bool kMask>
__device__ __forceinline__ float sum_wide_tiles(const TapPlane<T, TapPath::Wide>& plane, const TapPlan& plan, int first, int last) {
  constexpr int kAtOnce = 2;
  float sum = 0;
  int step = plan.lanes * kTileWindows<T>, below = int(plan.shape.height / 2 * plan.row.divisor);  // windows from there on have one row
  auto tiles = [&](auto is_all, int i) {
    constexpr bool kAll = decltype(is_all)::value;
    uint32_t x[kAtOnce][2][kTileWords];
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      int window = i + t * step, h = int(divide(uint32_t(window), plan.row));
      const T* corner = plane.u + 2 * h * plane.stride_h + 2 * (window - h * int(plan.row.divisor));
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (kAll)
          load_whole(x[t][r], corner + r * plane.stride_h, plane.policy);
        else
          load_whole_if(x[t][r], window < (r ? min(last, below) : last), corner + r * plane.stride_h, plane.policy);
      }
    }
#pragma unroll
    for (int t = 0; t < kAtOnce; ++t) {
      int window = i + t * step;
      if (!kAll && t > 0 && window >= last) break;
      bool both = kAll || window < below;
      TileChoice<T> tile = choose_tile<T>(x[t], plane.shift, both ? kWholeTile : kUpperHalf, kMask, sum);
      if (both) store_whole(plane.m + window, tile.m);
      if constexpr (kMask) store_stream(plane.mask + window, tile.mask, plane.policy);
    }
  };
  for (int i = first; i < last; i += step * kAtOnce) {
    if (i + (kAtOnce - 1) * step < min(last, below))
      tiles(std::true_type{}, i);
    else
      tiles(std::false_type{}, i);
  }
  return sum;
}

// The same window by window. access: bytes that may be read at once, where rows are as long.
template <class T, TapPath kPath>
__device__ __forceinline__ float sum_tiles(const TapPlane<T, kPath>& plane, const TapPlan& plan, int first, int last, int access) {
  using Step = typename TapPlane<T, kPath>::Step;
  float sum = 0;
  int height = int(plan.shape.height), width = int(plan.shape.width), odd = width % 2;  // m has as many windows fewer in a row
  int together = windows_together(access, width, plane.m, plane.mask);
  int whole = together ? min(last, height / 2 * int(plan.row.divisor)) : 0;  // windows before have all four elements
  auto tile = [&](auto windows_at_once, int window) {
    constexpr int kTogether = decltype(windows_at_once)::value, kStep = kTogether == 0 ? 1 : kTogether;
    constexpr bool kWhole = kTogether > 0;

    // Load
    uint32_t x[2][kTileWords] = {}, inside = kWhole ? kWholeTile : 0;
    walk_tile<T, kStep>(window, last, height, width, plan.row, [&](int i, int h, int w, uint32_t of_window) {
      const T* corner = plane.u + 2 * h * plane.stride_h + 2 * w * plane.stride_w;
      if constexpr (kWhole) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          auto words = plane.template read<Neighbours<T, kStep>>(corner + r * plane.stride_h);
#pragma unroll
          for (int q = 0; q < 2 * kStep / kPer<T>; ++q) x[r][i * 2 / kPer<T> + q] = words[q];
        }
      } else {
        inside |= of_window << (4 * i);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (of_window >> j & 1)
            set_element<T>(x[j / 2], 2 * i + j % 2, plane.template read<Bits<T>>(corner + j / 2 * plane.stride_h + Step(j % 2) * plane.stride_w));
      }
    });
    TileChoice<T> tile = choose_tile<T>(x, plane.shift, inside, plane.mask, sum);

    // Store
    auto store_m = [&](int i, int at) { reinterpret_cast<Bits<T>*>(plane.m)[at] = Bits<T>(element_of<T>(tile.m, i)); };
    if constexpr (kTogether == 2) {
#pragma unroll
      for (int q = 0; q < 2; ++q) *reinterpret_cast<uint32_t*>(plane.m + window + 2 * q) = tile.m[q];
    } else if constexpr (kWhole) {
#pragma unroll
      for (int i = 0; i < kTileWindows<T>; ++i) store_m(i, window + i);
    } else {
      walk_tile<T, 1>(window, last, height, width, plan.row, [&](int i, int h, int, uint32_t of_window) {
        if (of_window == 15) store_m(i, window + i - h * odd);
      });
    }
    if (plane.mask)
#pragma unroll
      for (int i = 0; i < kTileWindows<T>; i += kStep)
        if (kWhole || window + i < last) {
          if constexpr (kTogether == 2)
            plane.write_mask(window + i, Vector<uint8_t, 2>{tile.mask[i], tile.mask[i + 1]});
          else
            plane.write_mask(window + i, tile.mask[i]);
        }
  };
  for (int i = first; i < last; i += plan.lanes * kTileWindows<T>) {
    if (i + kTileWindows<T> > whole)
      tile(std::integral_constant<int, 0>{}, i);
    else if (kPath == TapPath::Staged && sizeof(T) == 2 && together == 2)
      tile(std::integral_constant<int, sizeof(T) == 2 ? 2 : 1>{}, i);
    else
      tile(std::integral_constant<int, 1>{}, i);
  }
  return sum;
}

// --- the mean alone ------------------------------------------------------------------------------------------------------------
// All bits of those of the elements first, first + 1, ... of a word that are less than count.
template <class T>
__device__ __forceinline__ uint32_t less_than(int first, int count) {
  if constexpr (kPer<T> == 2)
    return (first < count ? 0xffffu : 0) | (first + 1 < count ? 0xffff0000u : 0);
  else
    return first < count ? ~0u : 0;
}

// The sum of v over a thread's pieces of eight elements. access: of a copy in shared memory; runs: rows follow each other.
template <class T, TapPath kPath>
__device__ __forceinline__ float sum_pieces(const TapPlane<T, kPath>& plane, const TapPlan& plan, int first, int last, int access, bool runs) {
  constexpr int V = kTapVector<T, false>, W = V / kPer<T>, kAtOnce = kPath == TapPath::Staged ? 1 : 16 / W;
  float sum = 0;
  int64_t pixels = pixels_of(plan.shape);
  auto length = [&](int piece) { return int(min(int64_t(V), pixels - int64_t(piece) * V)); };
  for (int i = first; i < last; i += plan.lanes * kAtOnce) {
    // Load
    uint32_t x[kAtOnce][W];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      int piece = i + j * plan.lanes;
      if (piece >= last) break;
      if constexpr (kPath == TapPath::Wide)
        load_whole(x[j], plane.u + int64_t(piece) * V, plane.policy);
      else if (kPath == TapPath::Staged)
        load_few<T, W, true>(x[j], plane.u + piece * V, length(piece), access);
      else if (runs)
        load_few(x[j], plane.u + int64_t(piece) * V, length(piece), access);
      else
        for (int q = 0; q < W; ++q) {
          x[j][q] = 0;
          for (int k = 0; k < kPer<T>; ++k) {
            int64_t element = int64_t(piece) * V + q * kPer<T> + k;
            if (element >= pixels) break;
            uint32_t h = divide(uint32_t(element), plan.row), w = uint32_t(element) - h * plan.row.divisor;
            x[j][q] |= uint32_t(plane.template read<Bits<T>>(plane.u + h * plane.stride_h + w * plane.stride_w)) << (16 * k);
          }
        }
    }

    // Rectify, sum, store
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      int piece = i + j * plan.lanes;
      if (j > 0 && piece >= last) break;
      uint32_t v[W];
#pragma unroll
      for (int q = 0; q < W; ++q) {
        v[q] = rectify<T>(Packed<T>::add(x[j][q], plane.shift));
        if (kPath != TapPath::Wide) v[q] &= less_than<T>(q * kPer<T>, length(piece));
      }
#pragma unroll
      for (int q = 0; q < W; q += 2) {
        float left = Packed<T>::get(v[q], 0), right = Packed<T>::get(v[q + 1], 0);
        if constexpr (kPer<T> == 2) left += Packed<T>::get(v[q], 1), right += Packed<T>::get(v[q + 1], 1);
        sum += left + right;
      }
      if (plane.mask) plane.write_mask(piece, passing_bits<T>(v));
    }
  }
  return sum;
}

// --- units -------------------------------------------------------------------------------------------------------------------
// Begins to bring a unit of u into shared memory.
template <class T>
__device__ __forceinline__ void start_unit(const TapParams& P, const TapBuffers& buffers, uint32_t unit) {
  const TapPlan& plan = P.plan;
  Team team(0, 4);
  if (unit >= plan.units || !team.has_me()) return;
  MapUnit at(unit, plan);
  TapExtent extent(at, plan);
  int pixels = int(pixels_of(plan.shape)), most = plan.staged.u;
  const T* image = static_cast<const T*>(P.u) + int64_t(at.group) * P.stride_b;
  start_run(team, buffers.u, image + extent.begin(most, pixels), extent.count(most, pixels), image, image + plan.shape.channels * pixels);
}

// Writes a unit of m and the mask from there, by the other warps.
template <class T, bool kPool>
__device__ __forceinline__ void store_unit(const TapParams& P, const TapBuffers& buffers, uint32_t unit) {
  const TapPlan& plan = P.plan;
  Team of_m(4, 2), of_mask(6, 2);
  if (!of_m.has_me() && !of_mask.has_me()) return;
  MapUnit at(unit, plan);
  TapExtent extent(at, plan);
  int out = int(plan.shape.height / 2) * int(plan.shape.width / 2), most_m = plan.staged.m, most_mask = plan.staged.mask;
  int64_t channels = int64_t(at.group) * plan.shape.channels;
  uint64_t policy = cache_policy(from_here(P.stream));
  auto plain = [](char* p, const Vector<uint32_t, 4>& chunk) { store_chunk(p, chunk); };
  auto stream = [&](char* p, const Vector<uint32_t, 4>& chunk) { store_stream(p, chunk, policy); };
  if (kPool && of_m.has_me()) store_run(of_m, static_cast<T*>(P.m) + channels * out + extent.begin(most_m, out), buffers.m, extent.count(most_m, out), plain);
  if (P.mask && of_mask.has_me())
    store_run(of_mask, P.mask + channels * plan.positions + extent.begin(most_mask, plan.positions), buffers.mask, extent.count(most_mask, plan.positions),
              stream);
}

template <class T>
inline int tap_planes_shared(const TapPlan& plan, bool staged) {
  return tap_shared_bytes(plan.lanes * plan.slab, staged ? &plan.staged : nullptr, sizeof(T));
}

template <class T, bool kPool, TapPath kPath, bool kMask>
__global__ void __launch_bounds__(kMapThreads, kPath == TapPath::Narrow ? 2 : 3) tap_planes(const __grid_constant__ TapParams P) {
  constexpr bool kStaged = kPath == TapPath::Staged;
  const TapPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  TapBuffers buffers(shared, plan.lanes * plan.slab, plan.staged, sizeof(T));
  uint64_t policy = cache_policy(P.stream);
  const bool masked = kPath == TapPath::Wide ? kMask : P.mask != nullptr;

  // Several planes at once, each by its threads
  int at_once = kMapThreads / plan.lanes, place = int(threadIdx.x) / plan.lanes, lane = int(threadIdx.x) - place * plan.lanes;
  if constexpr (kStaged) start_unit<T>(P, buffers, blockIdx.x);

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    TapExtent extent(at, plan);
    int64_t image = at.group;
    int out = int(s.height / 2) * int(s.width / 2), pixels = int(pixels_of(s));
    T* m = static_cast<T*>(P.m) + image * s.channels * out;
    uint8_t* mask = P.mask + image * s.channels * plan.positions;
    const T* u = static_cast<const T*>(P.u) + image * P.stride_b;

    auto sum_of_plane = [&](int plane) {
      if (plane >= extent.planes) return 0.0f;
      TapPlane<T, kPath> from{};
      int access = P.access, first = extent.first + lane * (kPool ? kTileWindows<T> : 1);
      if constexpr (kStaged) {
        const TapRuns& most = plan.staged;
        const T* copy = run_in(buffers.u, u, extent.begin(most.u, pixels));
        from.u = copy + plane * pixels - extent.skipped(most.u), from.stride_h = int(s.width), from.stride_w = 1;
        access = alignment_of(copy, pixels * int(sizeof(T)));
        if constexpr (kPool) from.m = run_in(buffers.m, m, extent.begin(most.m, out)) + plane * out - extent.skipped(most.m);
        if (masked) from.mask = run_in(buffers.mask, mask, extent.begin(most.mask, plan.positions)) + plane * plan.positions - extent.first;
      } else {
        int64_t channel = extent.channel + plane;
        from.u = u + channel * P.stride_c, from.stride_h = P.stride_h, from.stride_w = P.stride_w;
        from.m = m + channel * out;
        if (masked) from.mask = mask + channel * plan.positions;
      }
      float one[kPer<T>], shift = P.shift ? load_as_float(P.shift, P.shift_dtype, (extent.channel + plane) * P.shift_stride) : -0.0f;
#pragma unroll
      for (int k = 0; k < kPer<T>; ++k) one[k] = shift;
      from.shift = Packed<T>::pack(one), from.policy = policy;
      if constexpr (kPool && kPath == TapPath::Wide)
        return sum_wide_tiles<T, kMask>(from, plan, first, extent.last);
      else if constexpr (kPool)
        return sum_tiles(from, plan, first, extent.last, access);
      else
        return sum_pieces(from, plan, first, extent.last, access, P.runs);
    };

    if constexpr (kPath == TapPath::Wide) {
      float sum = sum_of_plane(place);
      __syncthreads();  // nobody reads the last unit's sums any more
      shared.rows()[lane * plan.slab + place] = sum;
    } else {
      if constexpr (kStaged) wait_for_copies();
      __syncthreads();  // the unit is there, and nobody reads anything of the last one any more
      if (place < at_once)
        for (int plane = place; plane < plan.slab; plane += at_once) shared.rows()[lane * plan.slab + plane] = sum_of_plane(plane);
    }
    __syncthreads();  // sums, m and the mask are complete, and nobody reads u any more
    if constexpr (kStaged) {
      start_unit<T>(P, buffers, unit + gridDim.x);
      store_unit<T, kPool>(P, buffers, uint32_t(from_here(int(unit))));
    }
    finish_means<true>(P, MapUnit(uint32_t(from_here(int(unit))), plan), shared, plan.lanes);
  }
}

}  // namespace interflow
