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

// Sums of one class: of dA's terms, of dy and of ds.
struct ClassSums {
  float da, dy, ds;
};

// A thread's class, and which sums are wanted.
struct ClassPlace {
  int stage, lane, reader;
  int64_t block, k;
  bool inside, sum_dy, sum_ds;
  float a;  // A[i, k], where ds scales dy

  __device__ __forceinline__ ClassPlace(const HeadBackward& P, int64_t number, int i)
      : stage(i), lane(threadIdx.x % kEpilogueClasses), reader(threadIdx.x / kEpilogueClasses), block(number), k(number * kEpilogueClasses + lane),
        inside(k < P.tail.classes), sum_dy(P.dy.data && P.tail.mode != Attention::Gated), sum_ds(P.dbias && (P.dscores || P.dbranches.data)),
        a(P.dbias && inside && scales_dy(P) ? stage_weight(P.tail, i, k) : 1.0f) {}
};

// A reader's share of its class's sums: eight numbers as a tree, trees in double precision.
__device__ __forceinline__ ClassSums sums_of_reader(const HeadBackward& P, const ClassPlace& at) {
  const HeadTail& T = P.tail;
  int64_t K = T.classes;
  double da = 0, dy = 0, ds = 0;
  float x[kEpilogueRows];
  if (at.inside && T.mode != Attention::Gated && P.dattention_weight) {
    bool products = P.product_terms;
    const float* terms = products ? P.product_terms + int64_t(P.weight_tiles[at.stage]) * K + at.k : P.score_terms + int64_t(at.stage) * K + at.k;
    int64_t stride = products ? K : T.count * K;
    int count = products ? P.weight_tiles[at.stage + 1] - P.weight_tiles[at.stage] : int(ceil_div(T.batch, kTileImages));
#pragma unroll 1
    for (int t = at.reader; t < count; t += kReaders * kEpilogueRows) {
      strided_elements(x, {terms, DType::F32}, t * stride, kReaders * stride, (count - t + kReaders - 1) / kReaders);
      da += sum_of_pairs(x);
    }
  }
  if (at.inside && (at.sum_dy || at.sum_ds)) {
#pragma unroll 1
    for (int64_t b = at.reader; b < T.batch; b += kReaders * kEpilogueRows) {
      int64_t left = ceil_div(T.batch - b, kReaders);
      int count = left < kEpilogueRows ? int(left) : kEpilogueRows;
      if (at.sum_dy) {
        strided_elements(x, P.dy, b * K + at.k, kReaders * K, count);
        dy += sum_of_pairs(x);
      }
      if (at.sum_ds) {
        score_gradients(x, P, b, kReaders, count, at.stage, at.k, at.a);
        ds += sum_of_pairs(x);
      }
    }
  }
  return {float(da), float(dy), float(ds)};
}

// 32 classes of one stage: a lane has a class, the warps share images and terms.
__device__ __forceinline__ void class_block(const HeadBackward& P, int64_t number, int i, bool attention, float* scratch) {
  const HeadTail& T = P.tail;
  ClassPlace at(P, number, i);
  int n = T.count;
  int64_t k = at.k, K = T.classes;
  ClassSums own = sums_of_reader(P, at);
  scratch[threadIdx.x] = own.da, scratch[kHeadThreads + threadIdx.x] = own.dy, scratch[2 * kHeadThreads + threadIdx.x] = own.ds;
  __syncthreads();
  if (at.reader != 0) return;

  // All readers'
  auto all = [&](int which) {
    float shares[kReaders];
#pragma unroll
    for (int r = 0; r < kReaders; ++r) shares[r] = scratch[which * kHeadThreads + r * kEpilogueClasses + at.lane];
    return sum_of_pairs(shares);
  };
  float da = all(0), dy = all(1), ds = all(2);
  bool gated = T.mode == Attention::Gated, by_class = T.mode == Attention::Classwise || T.mode == Attention::Folded;
  if (at.inside && P.dattention_weight && P.product_terms && T.bias.data) da = fmaf(parameter(T.bias, i * K + k), dy, da);
  if (at.inside && P.dbias) store_float(P.dbias, T.bias.dtype, i * K + k, at.sum_ds ? ds : at.a * dy);
  if (!attention || gated) return;
  if (by_class) {
    if (at.inside && P.dattention_weight) store_float(P.dattention_weight, T.attention_weight.dtype, i * K + k, da);
    if (at.inside && P.dattention_bias && i == 0) store_float(P.dattention_bias, T.attention_bias.dtype, k, dy);
    return;
  }

  // Over classes: this block's share of the terms of stage i
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    da += __shfl_xor_sync(~0u, da, distance);
    dy += __shfl_xor_sync(~0u, dy, distance);
  }
  int64_t shares = epilogue_shares(T);
  if (at.lane == 0) P.epilogue_terms[i * shares + number] = da;
  if (at.lane == 0 && i == 0) P.epilogue_terms[n * shares + number] = dy;
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
