// The tail: pooled values of 16 images times a tile of classes, aggregated by the attention.
//
// Columns go to warps in blocks of 32, round robin over all stages, so that every warp has its loads in flight at once. Of each block a warp
// computes z's share for its 16 x `NT * 8` outputs and adds it, times A[i,k], to y's: so y needs one meeting of the warps, whatever n is. Where the branch
// scores are wanted too, each warp leaves them stage by stage in shared memory. The order of all sums depends on D alone.
//
// Weights in bf16 or fp16 go through the tensor cores: they are TF32 numbers exactly, and pooled is split into two of those, p = high + low,
// which keeps 21 bits of it. fp32 weights go through fused multiply-adds.
#pragma once
#include "device.cuh"
#include "interflow_head_kernels.h"

namespace interflow {

constexpr int kBlockColumns = 32;
constexpr int kWarps = kHeadThreads / kWarp;

__device__ __forceinline__ float parameter(const Parameter& p, int64_t i) { return load_as_float(p.data, p.dtype, i); }

// A[i, k] of the linear modes: what z_i counts in y.
__device__ __forceinline__ float aggregation(const HeadTail& T, int i, int64_t k) {
  switch (T.mode) {
    case Attention::Folded: return 1;
    case Attention::Classwise: return parameter(T.attention_weight, i * T.classes + k);
    case Attention::NByN: {
      float sum = 0;
#pragma unroll 1
      for (int j = 0; j < T.count; ++j) sum += parameter(T.attention_weight, j * T.count + i);
      return sum;
    }
    default: return parameter(T.attention_weight, i);
  }
}

// c[k] of the linear modes, 0 where there is none.
__device__ __forceinline__ float aggregation_offset(const HeadTail& T, int64_t k) {
  if (!T.attention_bias.data) return 0;
  if (T.mode == Attention::Classwise || T.mode == Attention::Folded) return parameter(T.attention_bias, k);
  float sum = 0;
  for (int j = 0; j < (T.mode == Attention::NByN ? T.count : 1); ++j) sum += parameter(T.attention_bias, j);
  return sum;
}

// N elements of pooled, which other blocks of this launch may have written.
template <int N>
__device__ __forceinline__ void pooled_elements(float (&x)[N], const float* p) {
#pragma unroll
  for (int e = 0; e < N; e += 4) {
    auto four = load_shared_result(reinterpret_cast<const Vector<float, 4>*>(p + e));
#pragma unroll
    for (int f = 0; f < 4; ++f) x[e + f] = four[f];
  }
}

// The tile's origin: image and class; rows of pooled and weight beyond the end are read as those before it and never stored.
struct Tile {
  int64_t image, klass;
  int images, classes;
};

// A warp's product of one block, [16, NT * 8] in registers: entry r of a lane is output (row(r), column(r)). Blocks that are whole and aligned
// load 16 bytes a lane; the others load elements where they are needed, 0 beyond the stage's end, for the same instructions.
template <class W, int NT>
struct BlockProduct;

// Tensor cores. A lane loads 16 bytes of a row of weight, 8 columns, and gives each to another instruction: the columns of a block are
// numbered so that lane j's elements 2s and 2s + 1 are the inner indices j and j + 4 of instruction s.
template <class W, int NT>
struct TensorProduct {
  static __device__ __forceinline__ int row(int r) { return int(threadIdx.x) % kWarp / 4 + (r & 2 ? 8 : 0); }
  static __device__ __forceinline__ int column(int r) { return r / 4 * 8 + int(threadIdx.x) % 4 * 2 + (r & 1); }

  // Instruction s: p[e] as the fragment of 16 rows has it, w(t, e) of every 8 classes.
  template <class Weights>
  static __device__ __forceinline__ void step(float (&out)[NT * 4], const float (&p)[4], Weights w) {
    uint32_t high[4], low[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      high[e] = to_tf32(p[e]);
      float rest = p[e] - __uint_as_float(high[e]);
      low[e] = to_tf32(fabsf(rest) < INFINITY ? rest : 0.0f);  // of infinities, NaN and what rounds to one there is no rest
    }
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      uint32_t b[2] = {__float_as_uint(to_float(w(t, 0))), __float_as_uint(to_float(w(t, 1)))};
      float(&c)[4] = *reinterpret_cast<float(*)[4]>(out + 4 * t);
      mma_16x8x8_tf32(c, low, b);
      mma_16x8x8_tf32(c, high, b);
    }
  }

  static __device__ __forceinline__ void run(float (&out)[NT * 4], const HeadTail& T, const Tile& tile, int64_t d, int64_t end) {
    int lane = threadIdx.x % kWarp, g = lane / 4, j = lane % 4;
    bool whole = T.vectors && d + kBlockColumns <= end;
    d += 8 * j;
    const float* p0 = T.pooled + (tile.image + min(g, tile.images - 1)) * T.width + d;
    const float* p1 = T.pooled + (tile.image + min(g + 8, tile.images - 1)) * T.width + d;
    auto weight = [&](int t) { return static_cast<const W*>(T.weight) + (tile.klass + min(8 * t + g, tile.classes - 1)) * T.width + d; };
#pragma unroll
    for (int r = 0; r < NT * 4; ++r) out[r] = 0;
    if (whole) {
      float p[2][8];
      pooled_elements(p[0], p0);
      pooled_elements(p[1], p1);
      Vector<W, 8> w[NT];
#pragma unroll
      for (int t = 0; t < NT; ++t) w[t] = *reinterpret_cast<const Vector<W, 8>*>(weight(t));
#pragma unroll
      for (int s = 0; s < 4; ++s) step(out, {p[0][2 * s], p[1][2 * s], p[0][2 * s + 1], p[1][2 * s + 1]}, [&](int t, int e) { return w[t][2 * s + e]; });
      return;
    }
#pragma unroll 1
    for (int s = 0; s < 8; s += 2) {
      auto pooled = [&](const float* p, int e) { return d + s + e < end ? load_shared_result(p + s + e) : 0.0f; };
      step(out, {pooled(p0, 0), pooled(p1, 0), pooled(p0, 1), pooled(p1, 1)}, [&](int t, int e) { return d + s + e < end ? weight(t)[s + e] : from_float<W>(0.0f); });
    }
  }
};
template <int NT>
struct BlockProduct<__nv_bfloat16, NT> : TensorProduct<__nv_bfloat16, NT> {};
template <int NT>
struct BlockProduct<__half, NT> : TensorProduct<__half, NT> {};

// Multiply-adds. A lane has 4 rows and NT classes.
template <int NT>
struct BlockProduct<float, NT> {
  static __device__ __forceinline__ int row(int r) { return int(threadIdx.x) % kWarp / 8 * 4 + r % 4; }
  static __device__ __forceinline__ int column(int r) { return int(threadIdx.x) % 8 + r / 4 * 8; }

  static __device__ __forceinline__ void run(float (&out)[NT * 4], const HeadTail& T, const Tile& tile, int64_t d, int64_t end) {
    int lane = threadIdx.x % kWarp;
    bool whole = T.vectors && d + kBlockColumns <= end;
    auto pooled = [&](int h) { return T.pooled + (tile.image + min(lane / 8 * 4 + h, tile.images - 1)) * T.width; };
    auto weight = [&](int t) { return static_cast<const float*>(T.weight) + (tile.klass + min(8 * t + lane % 8, tile.classes - 1)) * T.width; };
#pragma unroll
    for (int r = 0; r < NT * 4; ++r) out[r] = 0;
    if (whole) {
#pragma unroll 1
      for (int k = 0; k < kBlockColumns; k += 4) {
        float p[4][4];
#pragma unroll
        for (int h = 0; h < 4; ++h) pooled_elements(p[h], pooled(h) + d + k);
#pragma unroll
        for (int t = 0; t < NT; ++t) {
          auto w = *reinterpret_cast<const Vector<float, 4>*>(weight(t) + d + k);
#pragma unroll
          for (int h = 0; h < 4; ++h)
#pragma unroll
            for (int e = 0; e < 4; ++e) out[4 * t + h] = fmaf(p[h][e], w[e], out[4 * t + h]);
        }
      }
      return;
    }
#pragma unroll 1
    for (int64_t k = d; k < d + kBlockColumns && k < end; ++k) {
#pragma unroll
      for (int h = 0; h < 4; ++h) {
        float p = load_shared_result(pooled(h) + k);
#pragma unroll
        for (int t = 0; t < NT; ++t) out[4 * t + h] = fmaf(p, weight(t)[k], out[4 * t + h]);
      }
    }
  }
};

// Shared memory of a tile of NT * 8 classes: A [n, NT * 8], y's shares [warps, 16, NT * 8], and with branches z's shares [n, warps, 16, 8].
template <int NT>
struct TailShared {
  float *a, *y, *z;
  static constexpr int kOutputs = kTileImages * NT * 8;
  __device__ __forceinline__ TailShared(float* shared, int n) : a(shared), y(a + n * NT * 8), z(y + kWarps * kOutputs) {}
  static INTERFLOW_HOST_DEVICE int floats(int n, bool branches) { return n * NT * 8 + kWarps * kOutputs + (branches ? n * kWarps * kOutputs : 0); }
};

// Every warp's shares of y (where mode is linear) and of z (where `branches`) -> shared memory. Ends without a barrier.
template <class W, int NT>
__device__ __forceinline__ void multiply(const HeadTail& T, const Tile& tile, const TailShared<NT>& shared, bool branches) {
  using Product = BlockProduct<W, NT>;
  constexpr int kOutputs = TailShared<NT>::kOutputs;
  int warp = threadIdx.x / kWarp;
  bool linear = T.mode != Attention::Gated;
  if (linear) {
    for (int j = threadIdx.x; j < T.count * NT * 8; j += kHeadThreads) {
      int i = j / (NT * 8), column = j - i * NT * 8;
      shared.a[j] = column < tile.classes ? aggregation(T, i, tile.klass + column) : 0.0f;
    }
    __syncthreads();
  }

  float y[NT * 4] = {};
  int block = 0;  // number of the stage's first among all blocks
#pragma unroll 1
  for (int i = 0; i < T.count; ++i) {
    int64_t end = T.begin[i + 1];
    int blocks = int(ceil_div(end - T.begin[i], kBlockColumns)), own = (warp - block) & (kWarps - 1);
    float z[NT * 4] = {};
#pragma unroll 1
    for (int64_t d = T.begin[i] + own * kBlockColumns; d < end; d += kWarps * kBlockColumns) {
      float share[NT * 4];
      Product::run(share, T, tile, d, end);
#pragma unroll
      for (int r = 0; r < NT * 4; ++r) {
        if (linear) y[r] = fmaf(shared.a[i * NT * 8 + Product::column(r)], share[r], y[r]);
        z[r] += share[r];
      }
    }
    block += blocks;
    if (branches)
#pragma unroll
      for (int r = 0; r < NT * 4; ++r) shared.z[(i * kWarps + warp) * kOutputs + Product::row(r) * NT * 8 + Product::column(r)] = z[r];
  }
  if (linear)
#pragma unroll
    for (int r = 0; r < NT * 4; ++r) shared.y[warp * kOutputs + Product::row(r) * NT * 8 + Product::column(r)] = y[r];
}

// The sum over warps of output o, in order.
template <int NT>
__device__ __forceinline__ float add_warps(const float* shares, int o) {
  float sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += shares[w * TailShared<NT>::kOutputs + o];
  return sum;
}

// z_i of output o with its bias, for every stage, into the first warp's share. By the thread that owns o.
template <int NT>
__device__ __forceinline__ void finish_scores(const HeadTail& T, const TailShared<NT>& shared, int o, int64_t klass) {
  constexpr int kOutputs = TailShared<NT>::kOutputs;
#pragma unroll 1
  for (int i = 0; i < T.count; ++i) {
    float* shares = shared.z + i * kWarps * kOutputs;
    float z = add_warps<NT>(shares, o);
    if (T.bias.data) z += parameter(T.bias, i * T.classes + klass);
    shares[o] = z;
  }
}

// softmax over branches of sum_j M_ij z_j + c_i, into the second warp's share; z in the first. Returns y.
template <int NT>
__device__ __forceinline__ float finish_gates(const HeadTail& T, const TailShared<NT>& shared, int o) {
  constexpr int kOutputs = TailShared<NT>::kOutputs;
  float *z = shared.z + o, *gate = z + kOutputs;
  int n = T.count, stage = kWarps * kOutputs;
  float highest = -INFINITY;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float s = parameter(T.attention_bias, i);
#pragma unroll 1
    for (int j = 0; j < n; ++j) s = fmaf(parameter(T.attention_weight, i * n + j), z[j * stage], s);
    gate[i * stage] = s;
    highest = i == 0 || highest < s ? s : highest;
  }
  float sum = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float e = expf(gate[i * stage] - highest);
    gate[i * stage] = e;
    sum += e;
  }
  float y = 0;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    gate[i * stage] /= sum;
    y = fmaf(gate[i * stage], z[i * stage], y);
  }
  return y;
}

}  // namespace interflow
