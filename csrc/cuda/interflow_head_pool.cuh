// Pooling: one unit of one stage, its sums into pooled, or into partial sums that the last of its parts to arrive adds up.
#pragma once
#include "device.cuh"
#include "interflow_head_kernels.h"

namespace interflow {

constexpr int kPoolSharedFloats = 8 * kHeadThreads;

// The window of a unit's bin: an origin in elements from the item's first, rows and columns.
struct Window {
  int64_t origin, row_stride, step_stride;
  int rows, columns;
};

__device__ __forceinline__ Window window_of(const HeadMap& map, uint32_t bin) {
  if (map.bins_h * map.bins_w == 1) return {0, map.stride_h, map.width == 1 ? map.stride_h : map.stride_w, int(map.height), int(map.width)};
  int64_t i = bin / map.bins_w, j = bin - i * map.bins_w;
  int64_t h = window_begin(i, map.bins_h, map.height), w = window_begin(j, map.bins_w, map.width);
  return {h * map.stride_h + w * map.stride_w, map.stride_h, map.stride_w, int(window_end(i, map.bins_h, map.height) - h), int(window_end(j, map.bins_w, map.width) - w)};
}

// Adds a thread's steps to sums, in order: kSteps loads, then their sums. For whole vectors at one stride, the case that has to be fast.
template <class T, int V>
__device__ __forceinline__ void add_flat_steps(float (&sums)[V], const T* item, int64_t stride, const StageSchedule& plan, int first, int steps, uint64_t policy) {
  const T* p = item + first * stride;
  int64_t next = stride << plan.log_steppers;
#pragma unroll 1
  for (int done = 0; done < plan.steps_each; done += kSteps) {
    Vector<T, V> x[kSteps];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[u][v] = from_float<T>(0.0f);
      if (first + ((done + u) << plan.log_steppers) < steps) x[u] = load_stream<Vector<T, V>>(p, policy);
      p += next;
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u)
#pragma unroll
      for (int v = 0; v < V; ++v) sums[v] += to_float(x[u][v]);
  }
}

// The same elements in the same order, one by one, by any strides.
template <class T, int V>
__device__ __forceinline__ void add_any_steps(float (&sums)[V], const T* item, const Window& window, const StageSchedule& plan, int first, int steps, uint64_t policy) {
  int64_t flat_stride = plan.pixels || V == 1 ? window.step_stride : V;
#pragma unroll 1
  for (int done = 0; done < plan.steps_each; ++done) {
    int step = first + (done << plan.log_steppers);
    if (step >= steps) break;
    int row = step / window.columns;
    const T* p = item + (plan.flat ? step * flat_stride : row * window.row_stride + (step - row * window.columns) * window.step_stride);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += to_float(load_stream<T>(p + v, policy));
  }
}

// Where a thread stands in its unit.
struct Place {
  int lane, stepper, item;
  __device__ __forceinline__ explicit Place(const StageSchedule& plan) {
    int t = threadIdx.x;
    lane = t & (plan.lanes() - 1);
    stepper = (t >> plan.log_lanes) & (plan.steppers() - 1);
    item = t >> (plan.log_lanes + plan.log_steppers);
  }
};

// sums of every thread -> sums of every item over its steppers, [items, lanes, N] in shared: within warps, then across them, in one order.
template <int N>
__device__ __forceinline__ void add_steppers(float (&sums)[N], const StageSchedule& plan, const Place& at, float* shared) {
  int in_warp = min(plan.steppers(), kWarp >> plan.log_lanes), across = plan.steppers() / in_warp, lanes = plan.lanes();
  for (int distance = lanes; distance < lanes * in_warp; distance *= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
  if ((at.stepper & (in_warp - 1)) == 0) {
    float* place = shared + ((at.item * across + at.stepper / in_warp) * lanes + at.lane) * N;
#pragma unroll
    for (int n = 0; n < N; ++n) place[n] = sums[n];
  }
  __syncthreads();
}

// Where an item's sum n of a unit belongs: image of the batch and channel; false beyond the end.
struct Target {
  int64_t image, channel;
  bool inside;
};
__device__ __forceinline__ Target target_of(const HeadSchedule& schedule, const StageSchedule& plan, uint32_t group, const Unit& unit, int item, int n) {
  uint32_t index = unit.block * uint32_t(plan.items()) + uint32_t(item), channels = uint32_t(plan.channels);
  int64_t first = int64_t(group) * schedule.group_images;
  if (plan.pixels) {
    int64_t channel = int64_t(unit.slab) * plan.width() + n;
    return {first + index, channel, index < uint32_t(schedule.images(group)) && channel < plan.channels};
  }
  uint32_t image = index / channels;
  return {first + image, index - image * channels, image < uint32_t(schedule.images(group))};
}

__device__ __forceinline__ void store_mean(const HeadForward& P, const HeadMap& map, const Target& to, const Unit& unit, float sum, const Window& window) {
  int64_t bins = map.bins_h * map.bins_w;
  if (to.inside) P.pooled[to.image * P.tail.width + map.column + to.channel * bins + unit.bin] = sum / float(window.rows * window.columns);
}

// Adds up all parts of a meeting, N columns a thread: up to 8 readers share the parts, then one thread a column adds up the readers.
template <int N>
__device__ __forceinline__ void add_parts(const float* parts, int count, int width, float* shared) {
  constexpr int kAtOnce = 4;
  int columns = width / N, readers = min(8, kHeadThreads / columns), reader = threadIdx.x / columns, column = (threadIdx.x - reader * columns) * N;
  if (reader < readers) {
    Vector<float, N> sum{};
    for (int part = reader; part < count; part += kAtOnce * readers) {
      Vector<float, N> x[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) {
        x[u] = {};
        if (part + u * readers < count) x[u] = load_shared_result(reinterpret_cast<const Vector<float, N>*>(parts + int64_t(part + u * readers) * width + column));
      }
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += x[u][n];
    }
#pragma unroll
    for (int n = 0; n < N; ++n) shared[reader * width + column + n] = sum[n];
  }
  __syncthreads();
  if (threadIdx.x < width) {
    float sum = 0;
    for (int r = 0; r < readers; ++r) sum += shared[r * width + threadIdx.x];
    shared[threadIdx.x] = sum;
  }
}

// The sums of a unit, [items, across, width] in shared, `across` warps for each item.
template <class T, int V>
__device__ __forceinline__ void sum_unit(const HeadForward& P, const StageSchedule& plan, const HeadMap& map, const Window& window, uint32_t group, const Unit& unit, float* shared) {
  Place at(plan);
  float sums[V];
#pragma unroll
  for (int v = 0; v < V; ++v) sums[v] = 0;
  Target from = target_of(P.schedule, plan, group, unit, at.item, at.lane * V);
  if (from.inside) {
    const T* item = static_cast<const T*>(map.data) + from.image * map.stride_b + from.channel * map.stride_c + window.origin;
    int pixels = window.rows * window.columns, steps = plan.pixels ? pixels : pixels / V;
    int first = (int(unit.part) * plan.steps_each << plan.log_steppers) + at.stepper;
    uint64_t policy = cache_policy(P.stream);
    if (plan.vectors && plan.flat)
      add_flat_steps<T, V>(sums, item, plan.pixels || V == 1 ? window.step_stride : V, plan, first, steps, policy);
    else
      add_any_steps<T, V>(sums, item, window, plan, first, steps, policy);
  }
  if (plan.pixels) return add_steppers(sums, plan, at, shared);
  float all[1] = {0};
#pragma unroll
  for (int v = 0; v < V; ++v) all[0] += sums[v];
  add_steppers(all, plan, at, shared);
}

// The instance for a stage's dtype and vector.
template <class T>
__device__ __forceinline__ void sum_unit_of(const HeadForward& P, const StageSchedule& plan, const HeadMap& map, const Window& window, uint32_t group, const Unit& unit, float* shared) {
  if constexpr (sizeof(T) == 2)
    if (plan.vector == 8) return sum_unit<T, 8>(P, plan, map, window, group, unit, shared);
  if (plan.vector == 4) return sum_unit<T, 4>(P, plan, map, window, group, unit, shared);
  if (plan.vector == 2) return sum_unit<T, 2>(P, plan, map, window, group, unit, shared);
  sum_unit<T, 1>(P, plan, map, window, group, unit, shared);
}

// A whole unit. Every thread of the block calls it; `flag` is a word of shared memory.
__device__ __forceinline__ void pool(const HeadForward& P, uint32_t group, const Unit& unit, float* shared, uint32_t* flag) {
  const StageSchedule& plan = P.schedule.stages[unit.stage];
  const HeadMap& map = P.maps[unit.stage];
  Window window = window_of(map, unit.bin);
  switch (map.dtype) {
    case DType::BF16: sum_unit_of<__nv_bfloat16>(P, plan, map, window, group, unit, shared); break;
    case DType::F16: sum_unit_of<__half>(P, plan, map, window, group, unit, shared); break;
    default: sum_unit_of<float>(P, plan, map, window, group, unit, shared); break;
  }

  // Out: means, or this part of them
  int width = plan.width(), across = max(1, plan.steppers() * plan.lanes() / kWarp);
  float* parts = P.partial + int64_t(group) * P.partial_group + P.partial_begin[unit.stage] + int64_t(unit.meeting) * plan.parts * width;
  for (int o = threadIdx.x; o < plan.items() * width; o += kHeadThreads) {
    int item = o / width, n = o - item * width;
    float sum = 0;
    for (int a = 0; a < across; ++a) sum += shared[(item * across + a) * width + n];
    if (plan.parts == 1)
      store_mean(P, map, target_of(P.schedule, plan, group, unit, item, n), unit, sum, window);
    else
      parts[int64_t(unit.part) * width + n] = sum;
  }
  __syncthreads();

  // Meet the other parts
  if (plan.parts > 1) {
    if (threadIdx.x == 0) {
      uint32_t* counter = P.counters + P.schedule.meeting_counter(group, unit.counter);
      bool last = atomic_add_acq_rel(counter, 1) + 1 == uint32_t(plan.parts);
      if (last) store_relaxed(counter, 0);
      *flag = last;
    }
    __syncthreads();
    if (!*flag) return;
    width >= 4 ? add_parts<4>(parts, plan.parts, width, shared) : add_parts<1>(parts, plan.parts, width, shared);
    if (threadIdx.x < width) store_mean(P, map, target_of(P.schedule, plan, group, unit, 0, threadIdx.x), unit, shared[threadIdx.x], window);
    __syncthreads();
  }
  if (threadIdx.x == 0) atomic_add_release(P.counters + P.schedule.done_counter(group), 1);
}

}  // namespace interflow
