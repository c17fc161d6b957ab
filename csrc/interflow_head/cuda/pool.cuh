// Pooling: one unit of one stage, its sums into pooled, or into partial sums that the last of its parts to arrive adds up.
//
// Every sum is a tree of pairs or in double precision: a chain of equal numbers in fp32 would round each time the same way.
// Whoever waits for a unit is notified of it once the loads of the block's next unit are on their way, so that fence, atomics and their latency
// lie beside these loads.
#pragma once
#include <type_traits>

#include "common/cuda/device.cuh"
#include "interflow_head/cuda/kernels.h"

namespace interflow {

constexpr int kLogWarp = 5;
constexpr int kUnitFloats = 8 * kHeadThreads;                      // sums of a unit
constexpr int kPoolSharedFloats = kUnitFloats + 2 * 4 * kHeadThreads;  // behind them sums of readers of a reduction, in double precision

// The window of a unit's bin: an origin in elements from the item's first, rows and columns.
struct Window {
  int64_t origin, row_stride, step_stride;
  int rows, columns;
};

__device__ __forceinline__ Window window_of(const Stage& map, uint32_t bin) {
  if (map.bins_h * map.bins_w == 1) return {0, map.stride_h, map.width == 1 ? map.stride_h : map.stride_w, int(map.height), int(map.width)};
  int64_t i = bin / map.bins_w, j = bin - i * map.bins_w;
  int64_t h = window_begin(i, map.bins_h, map.height), w = window_begin(j, map.bins_w, map.width);
  return {h * map.stride_h + w * map.stride_w, map.stride_h, map.stride_w, int(window_end(i, map.bins_h, map.height) - h), int(window_end(j, map.bins_w, map.width) - w)};
}

// A thread's steps, summed: all loads, then their sums. For whole vectors at one stride, the case that has to be fast.
template <class T, int V, class AfterLoads>
__device__ __forceinline__ void add_flat_steps(float (&sums)[V], const T* item, int64_t stride, const StageSchedule& plan, int first, int steps, uint64_t policy, AfterLoads after_loads) {
  constexpr int kBytes = V * int(sizeof(T));
  const T* p = item + first * stride;
  int64_t next = stride << plan.log_steppers;
  Words<kBytes> x[kSteps];
#pragma unroll
  for (int u = 0; u < kSteps; ++u, p += next) x[u] = load_stream_if<kBytes>(first + (u << plan.log_steppers) < steps, p, policy);
  after_loads();
  add_pairs<0, kSteps>(sums, [&](int u, int v) { return word_element<T>(x[u].at, v); });
}

// The same elements in the same tree, one by one, by any strides.
template <class T, int V>
__device__ __forceinline__ void add_any_steps(float (&sums)[V], const T* item, const Window& window, const StageSchedule& plan, int first, int steps, uint64_t policy) {
  constexpr int kLevels = 4;
  static_assert(1 << kLevels == kSteps);
  int64_t flat_stride = plan.pixels || V == 1 ? window.step_stride : V;
  float left[kLevels][V] = {};  // of level l: the sum of 2^l steps that waits for its right half
#pragma unroll 1
  for (int done = 0; done < kSteps; ++done) {
    int step = first + (done << plan.log_steppers), row = step / window.columns;
    const T* p = item + (plan.flat ? step * flat_stride : row * window.row_stride + (step - row * window.columns) * window.step_stride);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = step < steps ? to_float(load_stream<T>(p + v, policy)) : 0.0f;
    bool is_right = true;
#pragma unroll
    for (int l = 0; l < kLevels; ++l) {
      bool waits = is_right && !(done >> l & 1);
      is_right = is_right && (done >> l & 1);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        if (waits) left[l][v] = sums[v];
        if (is_right) sums[v] = left[l][v] + sums[v];
      }
    }
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
  int log_in_warp = min(plan.log_steppers, kLogWarp - plan.log_lanes), in_warp = 1 << log_in_warp, lanes = plan.lanes();
  for (int distance = lanes; distance < lanes * in_warp; distance *= 2)
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] += __shfl_xor_sync(~0u, sums[n], distance);
  if ((at.stepper & (in_warp - 1)) == 0) {
    float* place = shared + ((((at.item << plan.log_steppers) + at.stepper) >> log_in_warp << plan.log_lanes) + at.lane) * N;
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

__device__ __forceinline__ void store_mean(const HeadForward& P, const Stage& map, const Target& to, const Unit& unit, float sum, const Window& window) {
  int64_t bins = map.bins_h * map.bins_w;
  if (to.inside) P.pooled[to.image * P.tail.width + map.column + to.channel * bins + unit.bin] = sum / float(window.rows * window.columns);
}

// Sums of all parts of a reduction, [width] by the first threads, in shared memory: N columns a thread, up to 8 readers share the parts.
template <int N>
__device__ __forceinline__ double add_parts(const float* parts, int count, int width, double* shared) {
  constexpr int kAtOnce = 4;
  int columns = width / N, readers = min(8, kHeadThreads / columns), reader = threadIdx.x / columns, column = (threadIdx.x - reader * columns) * N;
  if (reader < readers) {
    double sum[N] = {};
#pragma unroll 1
    for (int part = reader; part < count; part += kAtOnce * readers) {
      Vector<float, N> x[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u) x[u] = load_shared_result(reinterpret_cast<const Vector<float, N>*>(parts + int64_t(min(part + u * readers, count - 1)) * width + column));
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
#pragma unroll
        for (int n = 0; n < N; ++n) sum[n] += part + u * readers < count ? x[u][n] : 0.0f;
    }
#pragma unroll
    for (int n = 0; n < N; ++n) shared[reader * width + column + n] = sum[n];
  }
  __syncthreads();
  double sum = 0;
  if (threadIdx.x < width)
    for (int r = 0; r < readers; ++r) sum += shared[r * width + threadIdx.x];
  return sum;
}

// The sums of a unit, [items, across, width] in shared, `across` warps for each item.
template <class T, int V, class AfterLoads>
__device__ __forceinline__ void sum_unit(const HeadForward& P, const StageSchedule& plan, const Stage& map, const Window& window, uint32_t group, const Unit& unit, float* shared,
                                         AfterLoads after_loads) {
  Place at(plan);
  float sums[V] = {};
  Target from = target_of(P.schedule, plan, group, unit, at.item, at.lane * V);
  if (from.inside) {
    const T* item = static_cast<const T*>(map.data) + from.image * map.stride_b + from.channel * map.stride_c + window.origin;
    int pixels = window.rows * window.columns, steps = plan.pixels ? pixels : pixels / V;
    int first = (int(unit.part) * kSteps << plan.log_steppers) + at.stepper;
    uint64_t policy = cache_policy(P.stream);
    if (plan.vectors && plan.flat) {
      add_flat_steps<T, V>(sums, item, plan.pixels || V == 1 ? window.step_stride : V, plan, first, steps, policy, after_loads);
    } else {
      after_loads();
      add_any_steps<T, V>(sums, item, window, plan, first, steps, policy);
    }
  }
  if (plan.pixels) return add_steppers(sums, plan, at, shared);
  float all[1] = {sum_of_pairs(sums)};
  add_steppers(all, plan, at, shared);
}

// The instance for a stage's vector.
template <class T, class AfterLoads>
__device__ __forceinline__ void sum_unit_of(const HeadForward& P, const StageSchedule& plan, const Stage& map, const Window& window, uint32_t group, const Unit& unit, float* shared,
                                            AfterLoads after_loads) {
  if constexpr (sizeof(T) == 2)
    if (plan.vector == 8) return sum_unit<T, 8>(P, plan, map, window, group, unit, shared, after_loads);
  if (plan.vector == 4) return sum_unit<T, 4>(P, plan, map, window, group, unit, shared, after_loads);
  if (plan.vector == 2) return sum_unit<T, 2>(P, plan, map, window, group, unit, shared, after_loads);
  sum_unit<T, 1>(P, plan, map, window, group, unit, shared, after_loads);
}

// A unit whose sums are in memory, of which nobody has been notified: its ticket; its parts, 0 where there is no unit; the counter of its reduction, or
// of its group's events where it is whole.
struct Pending {
  uint32_t ticket, parts;
  uint32_t* counter;
};

// Tells of it, after a barrier behind what was stored; by one thread. True where this is the last of the parts to arrive.
__device__ __forceinline__ bool notify(const Pending& unit) {
  if (unit.parts == 0) return false;
  if (unit.parts == 1) {
    atomic_add_release(unit.counter, 1);
    return false;
  }
  bool last = atomic_add_acq_rel(unit.counter, 1) + 1 == unit.parts;
  if (last) store_relaxed(unit.counter, 0);
  return last;
}

__device__ __forceinline__ float* parts_of(const HeadForward& P, uint32_t group, const Unit& unit) {
  const StageSchedule& plan = P.schedule.stages[unit.stage];
  return P.partial + int64_t(group) * P.partial_group + P.partial_begin[unit.stage] + int64_t(unit.reduction) * plan.parts * plan.width();
}

// The parts of a unit, all there, become means. Every thread of the block calls it, behind a barrier that notify() came before.
__device__ __forceinline__ void reduce_parts(const HeadForward& P, uint32_t number, float* shared) {
  Ticket ticket = P.schedule.ticket(number);
  Unit unit = P.schedule.unit(ticket.group, ticket.index);
  const StageSchedule& plan = P.schedule.stages[unit.stage];
  const Stage& map = P.maps[unit.stage];
  const float* parts = parts_of(P, ticket.group, unit);
  double* readers = reinterpret_cast<double*>(shared + kUnitFloats);
  int width = plan.width();
  double sum = width >= 4 ? add_parts<4>(parts, plan.parts, width, readers) : add_parts<1>(parts, plan.parts, width, readers);
  if (threadIdx.x < width) store_mean(P, map, target_of(P.schedule, plan, ticket.group, unit, 0, threadIdx.x), unit, float(sum), window_of(map, unit.bin));
  __syncthreads();
  if (threadIdx.x == 0) atomic_add_release(P.counters + P.schedule.done_counter(ticket.group), 1);
}

// Tells of a unit behind which the block has no other to load. Every thread of the block calls it, behind a barrier.
__device__ __forceinline__ void settle(const HeadForward& P, Pending& before, float* shared, uint32_t* flag) {
  if (before.parts == 0) return;
  if (threadIdx.x == 0) *flag = notify(before);
  __syncthreads();
  if (*flag) reduce_parts(P, before.ticket, shared);
  before.parts = 0;
}

// A whole unit. Every thread of the block calls it; `flag` and `slot` are words of shared memory. Once its loads are on their way the next ticket is
// drawn, which goes to *slot, and `before` is told of; then that is this one.
__device__ __forceinline__ void pool(const HeadForward& P, uint32_t number, uint32_t group, const Unit& unit, Pending& before, float* shared, uint32_t* flag, uint32_t* slot) {
  const StageSchedule& plan = P.schedule.stages[unit.stage];
  const Stage& map = P.maps[unit.stage];
  Window window = window_of(map, unit.bin);
  uint32_t next = 0;
  auto after_loads = [&] {
    if (threadIdx.x != 0) return;
    next = draw_ticket(P.counters + HeadSchedule::kNext);
    *flag = notify(before);
  };
  switch (map.dtype) {
    case DType::BF16: sum_unit_of<__nv_bfloat16>(P, plan, map, window, group, unit, shared, after_loads); break;
    case DType::F16: sum_unit_of<__half>(P, plan, map, window, group, unit, shared, after_loads); break;
    default: sum_unit_of<float>(P, plan, map, window, group, unit, shared, after_loads); break;
  }
  bool reduces = *flag;

  // Out: means, or this part of them
  int log_width = plan.log_width(), width = 1 << log_width, across = max(1, 1 << (plan.log_steppers + plan.log_lanes) >> kLogWarp);
  for (int o = threadIdx.x; o < plan.items() << log_width; o += kHeadThreads) {
    int item = o >> log_width, n = o & (width - 1);
    float shares[kWarps];
#pragma unroll
    for (int a = 0; a < kWarps; ++a) shares[a] = a < across ? shared[(item * across + a) * width + n] : 0.0f;
    float sum = sum_of_pairs(shares);
    if (plan.parts == 1)
      store_mean(P, map, target_of(P.schedule, plan, group, unit, item, n), unit, sum, window);
    else
      parts_of(P, group, unit)[int64_t(unit.part) * width + n] = sum;
  }
  if (reduces) reduce_parts(P, before.ticket, shared);
  int64_t counter = plan.parts == 1 ? P.schedule.done_counter(group) : P.schedule.reduction_counter(group, unit.counter);
  before = {number, uint32_t(plan.parts), P.counters + counter};
  if (threadIdx.x == 0) *slot = next;
}

}  // namespace interflow
