// Sums over a block's threads and over rows that blocks publish, each in one order; and who arrives last.
#pragma once
#include "device.cuh"
#include "stage_tap_kernels.h"

namespace interflow {

struct TapShared {
  float rows[kTapThreads * 8];  // [threads, a piece's channels] or less
  double few[kTapThreads];
  uint32_t last;
};

// Sum of n numbers four at a time.
template <class Sum, class Get>
__device__ __forceinline__ Sum sum_of(int n, Get get) {
  Sum sum = 0;
  int i = 0;
  for (; i + 4 <= n; i += 4) {
    Sum a = get(i), b = get(i + 1), c = get(i + 2), d = get(i + 3);
    sum += (a + b) + (c + d);
  }
  for (; i < n; ++i) sum += get(i);
  return sum;
}

// shared.rows [outer, count, channels] summed over the middle: result(o, c, sum), each by one thread. All threads take part; the
// rows are complete after a barrier.
template <class Result>
__device__ __forceinline__ void sum_rows(TapShared& shared, int outer, int count, int channels, Result result) {
  int outputs = outer * channels, thread = int(threadIdx.x), shares = min(count, kTapThreads / outputs);
  if (shares <= 1) {
    for (int i = thread; i < outputs; i += kTapThreads) {
      int o = i / channels, c = i - o * channels;
      const float* rows = shared.rows + o * count * channels + c;
      result(o, c, sum_of<float>(count, [&](int r) { return rows[r * channels]; }));
    }
    return;
  }
  int share = thread / outputs, i = thread - share * outputs, o = i / channels, c = i - o * channels;
  if (share < shares) {
    const float* rows = shared.rows + (o * count + share) * channels + c;
    shared.few[thread] = double(sum_of<float>((count - share + shares - 1) / shares, [&](int r) { return rows[r * shares * channels]; }));
  }
  __syncthreads();
  if (share == 0) result(o, c, float(sum_of<double>(shares, [&](int s) { return shared.few[s * outputs + i]; })));
}

// Rows [count, channels] that lie `pitch` apart and that this block knows to be published, summed: result(c, sum).
template <class Result>
__device__ __forceinline__ void sum_published_rows(TapShared& shared, const float* rows, int64_t pitch, int count, int channels, Result result) {
  int thread = int(threadIdx.x), shares = min(count, kTapThreads / channels);
  auto sum = [&](int first, int step, int c) {
    int n = first < count ? (count - first + step - 1) / step : 0;
    return sum_of<double>(n, [&](int r) { return double(load_shared_result(rows + (first + int64_t(r) * step) * pitch + c)); });
  };
  if (shares <= 1) {
    for (int c = thread; c < channels; c += kTapThreads) result(c, float(sum(0, 1, c)));
    return;
  }
  int share = thread / channels, c = thread - share * channels;
  if (share < shares) shared.few[thread] = sum(share, shares, c);
  __syncthreads();
  if (share == 0) result(c, float(sum_of<double>(shares, [&](int s) { return shared.few[s * channels + c]; })));
}

// Publishes what the block wrote and says whether it is the last of `expected`, which then sees what all of them wrote. Leaves the
// counter zero.
__device__ __forceinline__ bool arrives_last(TapShared& shared, uint32_t* arrivals, uint32_t expected) {
  __syncthreads();
  if (threadIdx.x == 0) {
    shared.last = atomic_add_acq_rel(arrivals, 1) + 1 == expected;
    if (shared.last) store_relaxed(arrivals, 0);
  }
  __syncthreads();
  return shared.last != 0;
}

}  // namespace interflow
