// A unit of an NCHW map as one run of elements: chunks of it, which planes they belong to, and the sums of planes.
#pragma once
#include "stage_end/cuda/chunk.cuh"

namespace interflow {

// What a unit covers: `count` elements of an image, from element `first` of plane `channel` on.
struct EndRun {
  int64_t channel;
  int planes, first, count;

  __device__ __forceinline__ EndRun(const MapUnit& at, const EndPlan& plan)
      : channel(int64_t(at.slab) * plan.slab), planes(int(min(int64_t(plan.slab), plan.shape.channels - channel))), first(int(at.part) * plan.part_size),
        count(plan.parts > 1 ? min(plan.part_size, plan.positions - first) : planes * plan.positions) {}

  // Where it begins, from the image's first element on.
  __device__ __forceinline__ int64_t begin(const EndPlan& plan) const { return channel * plan.positions + first; }
};

// Which plane of the unit a chunk's first element is of, and how many of its elements are; the others are of the next one.
struct EndSplit {
  int plane, left;
  template <int V>
  static __device__ __forceinline__ EndSplit of(int chunk, const EndPlan& plan) {
    if (plan.slots == 1) return {0, V};
    int element = chunk * V, plane = int(divide(uint32_t(element), plan.plane));
    return {plane, min(V, (plane + 1) * plan.positions - element)};
  }
};

// Elements of a chunk one by one, of a map whose planes and rows lie anywhere. image: the map's first element there.
template <class T>
__device__ __forceinline__ void gather_chunk(Chunk& x, const T* image, const StridedMap& map, const EndRun& run, const EndPlan& plan, int chunk, int count) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;
#pragma unroll
  for (int q = 0; q < kChunkWords; ++q) x[q] = 0;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    if (i >= count) break;
    uint32_t element = uint32_t(run.first + chunk * kChunk<T> + i), plane = divide(element, plan.plane), pixel = element - plane * plan.plane.divisor;
    uint32_t h = divide(pixel, plan.row), w = pixel - h * plan.row.divisor;
    Bits bits = load_cached<Bits>(image + (run.channel + plane) * map.stride_c + h * map.stride_h + w * map.stride_w);
    x[i / kPer<T>] |= uint32_t(bits) << (kPer<T> == 2 ? 16 * (i % 2) : 0);
  }
}

// A chunk of a map, as pitches and addresses allow; zeros behind `count`.
template <class T>
__device__ __forceinline__ void load_chunk(Chunk& x, const EndMap& m, int64_t image, const EndRun& run, const EndPlan& plan, int chunk, int count) {
  const T* p = static_cast<const T*>(m.map.data) + image * m.map.stride_b;
  if (m.access == 0)
    gather_chunk(x, p, m.map, run, plan, chunk, count);
  else
    load_few(x, p + run.begin(plan) + chunk * kChunk<T>, count, m.access);
}

// What a chunk leaves for the sums of its planes, in the order of chunks. x(i): element i as it is summed; those behind `count` are 0. alone: the thread's
// sum where the unit is of one plane.
template <class T, class Element>
__device__ __forceinline__ void leave_sums(float* rows, float& alone, const EndPlan& plan, int chunk, const EndSplit& split, Element x) {
  constexpr int V = kChunk<T>;
  if (plan.slots > 2) {
#pragma unroll
    for (int i = 0; i < V; ++i) rows[chunk * V + i] = x(i);
    return;
  }
  if (plan.slots == 1) {
    float whole[V];
#pragma unroll
    for (int i = 0; i < V; ++i) whole[i] = x(i);
    alone += sum_of_pairs(whole);
    return;
  }
  float each[V];
#pragma unroll
  for (int i = 0; i < V; ++i) each[i] = i < split.left ? x(i) : 0.0f;
  rows[2 * chunk] = sum_of_pairs(each);
  if (split.left == V) return;
#pragma unroll
  for (int i = 0; i < V; ++i) each[i] = i < split.left ? 0.0f : x(i);
  rows[2 * chunk + 1] = sum_of_pairs(each);
}

// What the chunks left of one plane.
struct EndNumbers {
  const float* rows;
  int number, step;
  bool skips;  // its first chunk begins in the plane before
  __device__ __forceinline__ float operator()(int r) const { return r < number ? rows[r * step + (r == 0 && skips)] : 0.0f; }
};

// result(plane, sum) for the unit's planes, of what its chunks left, behind a barrier.
template <int V, class Result>
__device__ __forceinline__ void sum_planes(BlockShared& shared, const EndPlan& plan, const EndRun& run, Result result) {
  auto column = [&](int plane) {
    if (plan.slots == 1) return EndNumbers{shared.rows(), kMapThreads, 1, false};
    int begin = plane * plan.positions, end = begin + plan.positions, first = begin / V;
    if (plan.slots > 2) return EndNumbers{shared.rows() + begin, end - begin, 1, false};
    return EndNumbers{shared.rows() + 2 * first, (end + V - 1) / V - first, 2, begin % V != 0};
  };
  sum_columns<float>(shared, run.planes, plan.most, column, result);
}

}  // namespace interflow
