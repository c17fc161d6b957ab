// What the three backward kernels of the head share: the gradient of Z, batches of loads that are all in flight at once, sums by eight lanes.
#pragma once
#include "interflow_head/cuda/tail.cuh"

namespace interflow {

// Elements first, first + step, ... of p as floats, 0 from the count-th on. All N loads are issued before the first is awaited.
template <int N>
__device__ __forceinline__ void strided_elements(float (&x)[N], const Parameter& p, int64_t first, int64_t step, int count) {
  auto load = [&](auto* data) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    constexpr int kBytes = int(sizeof(T));
    data += first;
    Words<kBytes> raw[N];
#pragma unroll
    for (int r = 0; r < N; ++r, data += step) raw[r] = load_if<kBytes>(r < count, data);
#pragma unroll
    for (int r = 0; r < N; ++r) x[r] = word_element<T>(raw[r].at, 0);
  };
  switch (p.dtype) {
    case DType::BF16: load(static_cast<const __nv_bfloat16*>(p.data)); break;
    case DType::F16: load(static_cast<const __half*>(p.data)); break;
    default: load(static_cast<const float*>(p.data)); break;
  }
}

// A[i, k] of the linear modes, as aggregation() has it; the n addends of an n x n attention are loaded together.
__device__ __forceinline__ float stage_weight(const HeadTail& T, int i, int64_t k) {
  if (T.mode != Attention::NByN) return aggregation(T, i, k);
  float a[kMaxStages], sum = 0;
  strided_elements(a, T.attention_weight, i, T.count, T.count);
#pragma unroll
  for (int j = 0; j < kMaxStages; ++j) sum += a[j];
  return sum;
}

// Whether ds is dy times A, which then has to be known.
__device__ __forceinline__ bool scales_dy(const HeadBackward& P) { return !P.dscores && P.dy.data; }

// ds[b, i, k] of images b, b + step, ..., 0 from the count-th on; a: A[i, k] where ds scales dy.
template <int N>
__device__ __forceinline__ void score_gradients(float (&ds)[N], const HeadBackward& P, int64_t b, int step, int count, int i, int64_t k, float a) {
  int64_t K = P.tail.classes, place = (b * P.tail.count + i) * K + k, stride = step * P.tail.count * K;
  if (P.dscores) return strided_elements(ds, {P.dscores, DType::F32}, place, stride, count);
  if (P.dy.data) {
    strided_elements(ds, P.dy, b * K + k, step * K, count);
#pragma unroll
    for (int r = 0; r < N; ++r) ds[r] = r < count ? a * ds[r] : 0.0f;
    if (!P.dbranches.data) return;
    constexpr int kAtOnce = N < 8 ? N : 8;  // more would take more registers than there are
#pragma unroll
    for (int done = 0; done < N; done += kAtOnce) {
      float z[kAtOnce];
      strided_elements(z, P.dbranches, place + done * stride, stride, count - done);
#pragma unroll
      for (int r = 0; r < kAtOnce; ++r) ds[done + r] += z[r];
    }
    return;
  }
  strided_elements(ds, P.dbranches, place, stride, count);
}

// The sum of f(p) over p < count by eight lanes side by side, in one order, for all of them; eight numbers as a tree, trees in double precision. By
// whole warps only.
constexpr int kAdders = 8;
template <class F>
__device__ __forceinline__ float sum_by_eight(unsigned count, F f) {
  constexpr unsigned kAtOnce = 8;
  double sum = 0;
#pragma unroll 1
  for (unsigned p = threadIdx.x % kAdders; p < count; p += kAtOnce * kAdders) {
    float x[kAtOnce];
#pragma unroll
    for (unsigned u = 0; u < kAtOnce; ++u) x[u] = f(min(p + u * kAdders, count - 1));  // without a branch, so that all loads are on their way together
#pragma unroll
    for (unsigned u = 0; u < kAtOnce; ++u) x[u] = p + u * kAdders < count ? x[u] : 0.0f;
    sum += sum_of_pairs(x);
  }
  float all = float(sum);
#pragma unroll
  for (int distance = kAdders / 2; distance > 0; distance /= 2) all += __shfl_xor_sync(~0u, all, distance);
  return all;
}

}  // namespace interflow
