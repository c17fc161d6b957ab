// Units of NCHW maps in shared memory. What follows each other in global memory, a run, comes and goes by 16 bytes; its copy keeps its
// address modulo 16, so that both are aligned alike and rows may begin anywhere.
#pragma once
#include "common/cuda/map_access.cuh"
#include "common/cuda/block_sums.cuh"

namespace interflow {

constexpr int kChunk = 16;

// What a run of so many bytes takes, wherever it begins.
__host__ __device__ constexpr int run_room(int bytes) { return (bytes + 2 * kChunk - 2) / kChunk * kChunk; }

// Where in a buffer the run begins that has its first element `offset` behind p.
template <class T>
__device__ __forceinline__ T* run_in(unsigned char* buffer, const T* p, int64_t offset) {
  return reinterpret_cast<T*>(buffer + ((uint32_t(reinterpret_cast<uintptr_t>(p)) + uint32_t(offset) * uint32_t(sizeof(T))) & (kChunk - 1)));
}

// The largest power of two up to 16 that divides an address and a distance.
__device__ __forceinline__ int alignment_of(const void* p, int bytes) {
  int all = int(reinterpret_cast<uintptr_t>(p) & 15) | bytes | 16;
  return all & -all;
}

// --- what a unit covers ------------------------------------------------------------------------------------------------------------
// The runs of a unit: several planes, or a part of one.
struct TapExtent {
  int64_t channel;   // of the first plane
  int planes, part;
  int first, last;   // positions of each plane

  __device__ __forceinline__ TapExtent(const MapUnit& at, const TapPlan& plan)
      : channel(int64_t(at.slab) * plan.slab), planes(int(min(int64_t(plan.slab), plan.shape.channels - channel))), part(int(at.part)),
        first(part * plan.part_size), last(min(plan.positions, first + plan.part_size)) {}

  // Where in its first plane a run begins, and how long it is, in elements. most: of one unit; of_plane: all elements of a plane.
  __device__ __forceinline__ int skipped(int most) const { return part * most; }
  __device__ __forceinline__ int count(int most, int of_plane) const { return min(most, planes * of_plane - part * most); }
  // That begin, from the image's first element on.
  __device__ __forceinline__ int64_t begin(int most, int of_plane) const { return channel * of_plane + skipped(most); }
};

// Buffers in a block's shared memory, behind the rows of sums.
struct TapBuffers {
  unsigned char *u, *m, *mask;
  __device__ __forceinline__ TapBuffers(BlockShared& shared, int rows, const TapRuns& most, int size) {
    u = reinterpret_cast<unsigned char*>(shared.rows() + (rows + 3) / 4 * 4);
    m = u + run_room(most.u * size), mask = m + run_room(most.m * size);
  }
};

inline int tap_shared_bytes(int rows, const TapRuns* most = nullptr, int size = 0) {
  return int(sizeof(BlockShared)) + (rows + 3) / 4 * 16 + (most ? run_room(most->u * size) + run_room(most->m * size) + run_room(most->mask) : 0);
}

// --- coming and going --------------------------------------------------------------------------------------------------------------
// Warps that move a run together while others do something else: what is computed for each run is computed by few.
struct Team {
  int thread, threads;
  __device__ __forceinline__ Team(int first_warp, int warps) : thread(int(threadIdx.x) - first_warp * kWarp), threads(warps * kWarp) {}
  __device__ __forceinline__ bool has_me() const { return thread >= 0 && thread < threads; }
};

// Bytes of a run, counted from the chunk on in which it begins; chunks [whole, whole_end) move whole, the elements beside them one by one.
struct RunBytes {
  int begin, end, whole, whole_end;
  template <class One>
  __device__ __forceinline__ void beside(int thread, int size, One one) const {
    int at = thread * size, head = begin + at, tail = max(whole, whole_end) + at;
    if (head < min(whole, end)) one(head);
    if (tail < end) one(tail);
  }
};

// Begins to copy a run of `count` elements; [lowest, highest) may be read.
template <class T>
__device__ __forceinline__ void start_run(const Team& team, unsigned char* buffer, const T* run, int count, const T* lowest, const T* highest) {
  int begin = int(reinterpret_cast<uintptr_t>(run) & (kChunk - 1)), end = begin + count * int(sizeof(T)), rounded = (end + kChunk - 1) & -kChunk;
  const char* from = reinterpret_cast<const char*>(run) - begin;
  bool low = from >= reinterpret_cast<const char*>(lowest), high = from + rounded <= reinterpret_cast<const char*>(highest);  // may be read
  RunBytes bytes{begin, end, low ? 0 : kChunk, high ? rounded : end & -kChunk};
#pragma unroll 2
  for (int at = bytes.whole + team.thread * kChunk; at < bytes.whole_end; at += team.threads * kChunk)
    copy_async<kChunk>(buffer + at, from + at);
  if (!(low && high)) bytes.beside(team.thread, sizeof(T), [&](int at) { *reinterpret_cast<T*>(buffer + at) = *reinterpret_cast<const T*>(from + at); });
}

// Writes a run of `count` elements.
template <class T, class Store>
__device__ __forceinline__ void store_run(const Team& team, T* run, const unsigned char* buffer, int count, Store store) {
  int begin = int(reinterpret_cast<uintptr_t>(run) & (kChunk - 1)), end = begin + count * int(sizeof(T));
  char* to = reinterpret_cast<char*>(run) - begin;
  RunBytes bytes{begin, end, begin ? kChunk : 0, end & -kChunk};
#pragma unroll 2
  for (int at = bytes.whole + team.thread * kChunk; at < bytes.whole_end; at += team.threads * kChunk)
    store(to + at, Vector<uint32_t, 4>(*reinterpret_cast<const Vector<uint32_t, 4>*>(buffer + at)));
  if ((begin | end) & (kChunk - 1))
    bytes.beside(team.thread, sizeof(T), [&](int at) { *reinterpret_cast<T*>(to + at) = *reinterpret_cast<const T*>(buffer + at); });
}

}  // namespace interflow
