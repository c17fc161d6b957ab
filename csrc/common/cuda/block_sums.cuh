// Sums over a block's threads and over rows that blocks publish, each in one order; and who arrives last.
#pragma once
#include "common/cuda/device.cuh"
#include "common/cuda/map_plan.h"

namespace interflow {

// The beginning of a block's shared memory; rows, whose number the kernel says, lie behind.
struct alignas(16) BlockShared {
  double few[kMapThreads];
  uint32_t last;
  __device__ __forceinline__ float* rows() { return reinterpret_cast<float*>(this + 1); }
};

// A thread's sums into its place of the rows, 16 bytes at a time: single floats of neighbours, which lie V apart, would meet in few banks.
template <int V>
__device__ __forceinline__ void store_row(float* to, const float (&sums)[V]) {
  static_assert(V % 4 == 0);
#pragma unroll
  for (int i = 0; i < V; i += 4) {
    Vector<float, 4> four{{sums[i], sums[i + 1], sums[i + 2], sums[i + 3]}};
    *reinterpret_cast<Vector<float, 4>*>(to + i) = four;
  }
}

// get(0) + ... + get(n - 1), eight at a time.
template <class Sum, class Get>
__device__ __forceinline__ Sum sum_of(int n, Get get) {
  Sum sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; i += 8) {
    Sum x[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = i + k < n ? Sum(get(i + k)) : Sum(0);
    sum += ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
  }
  return sum;
}

constexpr int kAlone = 32;  // numbers that one thread adds: sharing them costs all threads of the block more

// result(i, the sum over r of column(i)(r)) for i < outputs and r < count, each by one thread. All threads take part, several for
// an output where there are more threads than outputs and many numbers; what is read is ready.
template <class Sum, class Column, class Result>
__device__ __forceinline__ void sum_columns(BlockShared& shared, int outputs, int count, Column column, Result result) {
  int thread = int(threadIdx.x);
  if (count <= kAlone) {
#pragma unroll 1
    for (int i = thread; i < outputs; i += kMapThreads) result(i, float(sum_of<Sum>(count, column(i))));
    return;
  }
  int per = min(outputs, kMapThreads), shares = min(count, kMapThreads / per), share = thread / per;
#pragma unroll 1
  for (int i = thread - share * per; i < outputs; i += per) {
    double sum = 0;
    auto get = column(i);
    if (share < shares) sum = double(sum_of<Sum>((count - share + shares - 1) / shares, [&](int r) { return get(share + r * shares); }));
    if (shares > 1) {  // then the loop has one round
      shared.few[thread] = sum;
      __syncthreads();
      if (share == 0) sum = sum_of<double>(shares, [&](int s) { return shared.few[s * per + i]; });
    }
    if (share == 0) result(i, float(sum));
  }
}

// shared.rows() [outer, count, channels], which a barrier completed, summed over the middle: result(o, c, sum).
template <class Result>
__device__ __forceinline__ void sum_rows(BlockShared& shared, int outer, int count, int channels, Result result) {
  sum_columns<float>(
      shared, outer * channels, count,
      [&](int i) {
        const float* column = shared.rows() + i / channels * (count - 1) * channels + i;
        return [column, channels](int r) { return column[r * channels]; };
      },
      [&](int i, float sum) {
        int o = i / channels;
        result(o, i - o * channels, sum);
      });
}

// The same where `outer` is one.
template <class Result>
__device__ __forceinline__ void sum_rows(BlockShared& shared, int count, int channels, Result result) {
  sum_columns<float>(
      shared, channels, count, [&](int i) { return [column = shared.rows() + i, channels](int r) { return column[r * channels]; }; }, result);
}

// Rows [count, channels] that lie `pitch` apart and that this block knows to be published, summed: result(c, sum).
template <class Result>
__device__ __forceinline__ void sum_published_rows(BlockShared& shared, const float* rows, int64_t pitch, int count, int channels, Result result) {
  sum_columns<double>(
      shared, channels, count, [&](int c) { return [rows, pitch, c](int r) { return load_shared_result(rows + r * pitch + c); }; }, result);
}

// What units of several blocks add up to has a counter, from zero and to zero, of those that have arrived.
struct Arrivals {
  uint32_t* counter;
  uint32_t expected;
};

// Arriving without waiting. A block publishes what it wrote for a unit during the next one, and learns during the one after that whether it was the last:
// fence and atomic take as long as many loads. So the loop over units has two rounds more:
//
//   for (uint32_t unit = blockIdx.x; unit < units + late.behind(); unit += gridDim.x) {
//     late.learn(shared, unit, arrivals);
//     __syncthreads();
//     bool last = late.last(shared);
//     __syncthreads();
//     write what the unit adds up to, where unit < units
//     late.publish(unit, units, arrivals);
//     if (last) add up what arrived with unit - late.behind()
//   }
class LateArrival {
 public:
  // meets: whether several units add up at all; else nothing is published, and no round is added.
  __device__ __forceinline__ explicit LateArrival(bool meets) : behind_(meets ? 2 * gridDim.x : 0) {}
  __device__ __forceinline__ uint32_t behind() const { return behind_; }

  // arrivals(unit): where a unit arrives.
  template <class Of>
  __device__ __forceinline__ void learn(BlockShared& shared, uint32_t unit, Of arrivals) const {
    if (!behind_ || threadIdx.x != kPublisher) return;
    bool last = false;
    if (unit >= blockIdx.x + behind_) {
      Arrivals at = arrivals(unit - behind_);
      last = before_ + 1 == at.expected;
      if (last) {
        (void)load_acquire(at.counter);  // what the others published is seen from here on
        store_relaxed(at.counter, 0);
      }
    }
    shared.last = last;
  }
  __device__ __forceinline__ bool last(const BlockShared& shared) const { return behind_ && shared.last != 0; }
  template <class Of>
  __device__ __forceinline__ void publish(uint32_t unit, uint32_t units, Of arrivals) {
    if (!behind_ || threadIdx.x != kPublisher || unit < blockIdx.x + gridDim.x || unit - gridDim.x >= units) return;
    before_ = atomic_add_release(arrivals(unit - gridDim.x).counter, 1);
  }

 private:
  static constexpr unsigned kPublisher = kMapThreads - 1;  // whose warp adds up nothing where there are few sums
  uint32_t behind_, before_ = 0;
};

// Publishes what the block wrote and says whether it is the last of `expected`, which then sees what all of them wrote. Leaves the
// counter zero.
__device__ __forceinline__ bool arrives_last(BlockShared& shared, uint32_t* arrivals, uint32_t expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomic_add_acq_rel(arrivals, 1) + 1 == expected;
    if (shared.last) store_relaxed(arrivals, 0);
  }
  __syncthreads();
  return shared.last != 0;
}

}  // namespace interflow
