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

constexpr int kAlone = 32;        // numbers that one thread adds: sharing them costs all threads of the block more
constexpr int kAddTogether = 16;  // threads that share what is left of more

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
      int left = shares;
      if (shares > kAlone) {  // one thread would add for as long as a unit's loads take
        left = kAddTogether;
        if (share < left) sum = sum_of<double>((shares - share + left - 1) / left, [&](int s) { return shared.few[(share + s * left) * per + i]; });
        __syncthreads();
        if (share < left) shared.few[thread] = sum;
        __syncthreads();
      }
      if (share == 0) sum = sum_of<double>(left, [&](int s) { return shared.few[s * per + i]; });
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
