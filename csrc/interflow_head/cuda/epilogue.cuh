// Backward, third kernel: db, and the attention's gradients from sums over the batch and the terms that the first two kernels left.
#pragma once
#include "interflow_head/cuda/gradient.cuh"

namespace interflow {

constexpr int kReaders = kHeadThreads / kEpilogueClasses;  // threads that share a class's sums
constexpr int kEpilogueRows = 8;                           // images that a reader loads at once
constexpr int kEpilogueFloats = 3 * kHeadThreads;

// Terms of the parameters that have no class of their own, one of epilogue_terms(), summed over classes and blocks.
// gated: dM, dc. Otherwise: dw_i at i, and the sum of dy at n.
__device__ __forceinline__ void store_shared_parameters(const HeadBackward& P, int term, float sum) {
  const HeadTail& T = P.tail;
  int n = T.count;
  auto put = [](void* data, DType dtype, int64_t i, float x) {
    if (data) store_float(data, dtype, i, x);
  };
  if (T.mode == Attention::Gated) {
    if (term < n * n) return put(P.dattention_weight, T.attention_weight.dtype, term, sum);
    return put(P.dattention_bias, T.attention_bias.dtype, term - n * n, sum);
  }
  if (term < n) {
    if (T.mode == Attention::NByN) {  // all n outputs are summed: the rows of M have one gradient
      for (int j = 0; j < n; ++j) put(P.dattention_weight, T.attention_weight.dtype, j * n + term, sum);
    } else {
      put(P.dattention_weight, T.attention_weight.dtype, term, sum);
    }
    return;
  }
  for (int j = 0; j < (T.mode == Attention::NByN ? n : 1); ++j) put(P.dattention_bias, T.attention_bias.dtype, j, sum);
}

// Calls f(t, sum) for every term t, by one thread: the sum of value(t, p) over p < count.
template <class Value, class F>
__device__ __forceinline__ void each_term(int terms, unsigned count, Value value, F f) {
#pragma unroll 1
  for (int first = 0; first < terms; first += kHeadThreads / kAdders) {
    int t = first + int(threadIdx.x) / kAdders;
    float sum = sum_by_eight(t < terms ? count : 0, [&](unsigned p) { return value(t, p); });
    if (threadIdx.x % kAdders == 0 && t < terms) f(t, sum);
  }
}

// 32 classes of one stage: a lane has a class, the warps share images and terms.
__device__ __forceinline__ void class_block(const HeadBackward& P, int64_t number, int i, bool attention, float* scratch) {
  const HeadTail& T = P.tail;
  int n = T.count, klass = threadIdx.x % kEpilogueClasses, reader = threadIdx.x / kEpilogueClasses;
  int64_t k = number * kEpilogueClasses + klass, K = T.classes;
  bool inside = k < K, gated = T.mode == Attention::Gated, by_class = T.mode == Attention::Classwise || T.mode == Attention::Folded;
  bool sum_ds = P.dbias && (P.dscores || P.dbranches.data), sum_dy = P.dy.data && !gated;
  float a = P.dbias && inside && scales_dy(P) ? stage_weight(T, i, k) : 1.0f, bias = 0;

  // Own share of three sums: of dA's terms, of dy and of ds
  float da = 0, dy = 0, ds = 0;
  if (!gated && P.dattention_weight && inside) {
    bool products = P.product_terms;
    const float* terms = products ? P.product_terms + int64_t(P.weight_tiles[i]) * K + k : P.score_terms + int64_t(i) * K + k;
    int64_t stride = products ? K : n * K;
    int count = products ? P.weight_tiles[i + 1] - P.weight_tiles[i] : int(ceil_div(T.batch, kTileImages));
#pragma unroll 4
    for (int t = reader; t < count; t += kReaders) da += terms[t * stride];
    if (products && T.bias.data) bias = parameter(T.bias, i * K + k);
  }
  if (inside && (sum_dy || sum_ds)) {
#pragma unroll 1
    for (int64_t b = reader; b < T.batch; b += kReaders * kEpilogueRows) {
      int64_t left = ceil_div(T.batch - b, kReaders);
      int count = left < kEpilogueRows ? int(left) : kEpilogueRows;
      float x[kEpilogueRows];
      if (sum_dy) {
        strided_elements(x, P.dy, b * K + k, kReaders * K, count);
#pragma unroll
        for (int r = 0; r < kEpilogueRows; ++r) dy += x[r];
      }
      if (sum_ds) {
        score_gradients(x, P, b, kReaders, count, i, k, a);
#pragma unroll
        for (int r = 0; r < kEpilogueRows; ++r) ds += x[r];
      }
    }
  }
  scratch[threadIdx.x] = da, scratch[kHeadThreads + threadIdx.x] = dy, scratch[2 * kHeadThreads + threadIdx.x] = ds;
  __syncthreads();
  if (reader != 0) return;

  // All readers'
  da = dy = ds = 0;
#pragma unroll
  for (int r = 0; r < kReaders; ++r) {
    const float* share = scratch + r * kEpilogueClasses + klass;
    da += share[0], dy += share[kHeadThreads], ds += share[2 * kHeadThreads];
  }
  da = fmaf(bias, dy, da);
  if (inside && P.dbias) store_float(P.dbias, T.bias.dtype, i * K + k, sum_ds ? ds : a * dy);
  if (!attention || gated) return;
  if (by_class) {
    if (inside && P.dattention_weight) store_float(P.dattention_weight, T.attention_weight.dtype, i * K + k, da);
    if (inside && P.dattention_bias && i == 0) store_float(P.dattention_bias, T.attention_bias.dtype, k, dy);
    return;
  }

  // Over classes: this block's share of the terms of stage i
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    da += __shfl_xor_sync(~0u, da, distance);
    dy += __shfl_xor_sync(~0u, dy, distance);
  }
  int64_t shares = epilogue_shares(T);
  if (klass == 0) P.epilogue_terms[i * shares + number] = da;
  if (klass == 0 && i == 0) P.epilogue_terms[n * shares + number] = dy;
}

// A block of stage and 32 classes; of the gates' terms it has an equal part of all tiles. The last block adds up all blocks' shares.
__device__ __forceinline__ void epilogue_block(const HeadBackward& P, uint32_t* flag, float* scratch) {
  const HeadTail& T = P.tail;
  bool gated = T.mode == Attention::Gated, attention = P.dattention_weight || P.dattention_bias;
  unsigned shares = unsigned(epilogue_shares(T)), number = blockIdx.x / unsigned(T.count), stage = blockIdx.x - number * unsigned(T.count);
  class_block(P, number, int(stage), attention, scratch);
  if (!attention || T.mode == Attention::Classwise || T.mode == Attention::Folded) return;
  int terms = epilogue_terms(T);
  if (gated && blockIdx.x < shares) {
    unsigned tiles = unsigned(score_tiles(T)), each = (tiles + shares - 1) / shares, begin = min(blockIdx.x * each, tiles), end = min(begin + each, tiles);
    each_term(
        terms, end - begin, [&](int t, unsigned p) { return P.gate_terms[int64_t(begin + p) * terms + t]; },
        [&](int t, float sum) { P.epilogue_terms[int64_t(t) * shares + blockIdx.x] = sum; });
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    bool last = atomic_add_acq_rel(P.counters, 1) + 1 == gridDim.x;
    if (last) store_relaxed(P.counters, 0);
    *flag = last;
  }
  __syncthreads();
  if (!*flag) return;
  each_term(
      terms, shares, [&](int t, unsigned p) { return load_shared_result(P.epilogue_terms + int64_t(t) * shares + p); },
      [&](int t, float sum) { store_shared_parameters(P, t, sum); });
}

}  // namespace interflow
