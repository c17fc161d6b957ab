// Units of NCHW maps in shared memory. What follows each other in global memory, a run, comes and goes by 16 bytes; its copy keeps its
// address modulo 16, so that both are aligned alike and rows may begin anywhere.
#pragma once
#include "stage_tap_access.cuh"
#include "stage_tap_sums.cuh"

namespace interflow {

constexpr int kChunk = 16;

// What a run of so many bytes takes, wherever it begins.
__host__ __device__ constexpr int run_room(int64_t bytes) { return int((bytes + 2 * kChunk - 2) / kChunk * kChunk); }

// Where in a room the run begins.
template <class T>
__device__ __forceinline__ T* run_in(unsigned char* room, const T* run) { return reinterpret_cast<T*>(room + (reinterpret_cast<uintptr_t>(run) & (kChunk - 1))); }

// The largest power of two up to 16 that divides an address and a distance.
__device__ __forceinline__ int alignment_of(const void* p, int bytes) {
  int all = int(reinterpret_cast<uintptr_t>(p) & 15) | bytes | 16;
  return all & -all;
}

// --- what a unit covers ------------------------------------------------------------------------------------------------------------
// Counts in elements of each run, from the beginning of the image on.
struct TapExtent {
  int first, last;    // positions of each plane
  int planes;
  int64_t channel, u, m, mask;
  int from_u, from_m; // of the first plane
  int u_count, m_count, mask_count;

  __device__ __forceinline__ TapExtent(const TapUnit& at, const TapPlan& plan, bool pool) {
    const TapShape& s = plan.shape;
    int height = int(s.height), width = int(s.width), pixels = height * width, out_w = width / 2, out = height / 2 * out_w, row = int(plan.row.divisor);
    channel = int64_t(at.slab) * plan.slab, planes = int(min(int64_t(plan.slab), s.channels - channel));
    first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);
    int end_u, end_m = 0;
    if (pool) {
      int from_h = int(divide(uint32_t(first), plan.row)), end_h = int(divide(uint32_t(last + row - 1), plan.row));  // parts are pairs of rows
      from_u = 2 * from_h * width, end_u = min(2 * end_h, height) * width;
      from_m = from_h * out_w, end_m = min(end_h * out_w, out);
    } else {
      from_u = first * 8, end_u = min(pixels, last * 8), from_m = 0;
    }
    u = channel * pixels + from_u, m = channel * out + from_m, mask = channel * plan.positions + first;
    u_count = (planes - 1) * pixels + end_u - from_u, m_count = (planes - 1) * out + end_m - from_m, mask_count = (planes - 1) * plan.positions + last - first;
  }
};

// Rooms of a block's shared memory, behind the rows of sums.
struct TapRooms {
  unsigned char *u, *m, *mask;
  __device__ __forceinline__ TapRooms(TapShared& shared, int rows, const TapRuns& most) {
    u = reinterpret_cast<unsigned char*>(shared.rows() + (rows + 3) / 4 * 4);
    m = u + run_room(most.u), mask = m + run_room(most.m);
  }
};

inline int tap_shared_bytes(int rows, const TapRuns* most = nullptr) {
  return int(sizeof(TapShared)) + (rows + 3) / 4 * 16 + (most ? run_room(most->u) + run_room(most->m) + run_room(most->mask) : 0);
}

// --- coming and going --------------------------------------------------------------------------------------------------------------
// Begins to copy a run of `count` elements; [lowest, highest) may be read. Chunks that are not inside are copied by elements.
template <class T>
__device__ __forceinline__ void start_run(unsigned char* room, const T* run, int count, const T* lowest, const T* highest, uint64_t policy) {
  int skip = int(reinterpret_cast<uintptr_t>(run) & (kChunk - 1)), end = skip + count * int(sizeof(T));
  const char* from = reinterpret_cast<const char*>(run) - skip;
  int64_t before = reinterpret_cast<const char*>(lowest) - from, behind = reinterpret_cast<const char*>(highest) - from;
  for (int at = int(threadIdx.x) * kChunk; at < end; at += kTapThreads * kChunk) {
    if (at >= before && at + kChunk <= behind) {
      copy_async<kChunk>(room + at, from + at, policy);
    } else {
#pragma unroll 1
      for (int i = max(at, skip); i < min(at + kChunk, end); i += int(sizeof(T))) *reinterpret_cast<T*>(room + i) = *reinterpret_cast<const T*>(from + i);
    }
  }
}

// Writes a run of `count` elements.
template <class T, class Store>
__device__ __forceinline__ void store_run(T* run, const unsigned char* room, int count, Store store) {
  int skip = int(reinterpret_cast<uintptr_t>(run) & (kChunk - 1)), end = skip + count * int(sizeof(T));
  char* to = reinterpret_cast<char*>(run) - skip;
  for (int at = int(threadIdx.x) * kChunk; at < end; at += kTapThreads * kChunk) {
    if (at >= skip && at + kChunk <= end) {
      store(to + at, *reinterpret_cast<const Vector<uint32_t, 4>*>(room + at));
    } else {
#pragma unroll 1
      for (int i = max(at, skip); i < min(at + kChunk, end); i += int(sizeof(T))) *reinterpret_cast<T*>(to + i) = *reinterpret_cast<const T*>(room + i);
    }
  }
}

}  // namespace interflow
