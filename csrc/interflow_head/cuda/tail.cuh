// The tail: pooled values of 16 images times a tile of classes, aggregated by the attention.
//
// Columns go to warps in blocks of 32, round robin over all stages, so that every warp has its loads in flight at once. Of each block a warp
// computes z's share for its 16 x `NT * 8` outputs and adds it, times A[i,k], to y's: so y needs one reduction of the warps, whatever n is. Where the branch
// scores are wanted too, each warp leaves them stage by stage in shared memory. The order of all sums depends on D alone.
//
// Weights in bf16 or fp16 go through the tensor cores: they are TF32 numbers exactly, and pooled is split into two of those, p = high + low,
// which keeps 21 bits of it. fp32 weights go through fused multiply-adds, from shared memory.
#pragma once
#include "common/cuda/device.cuh"
#include "interflow_head/cuda/kernels.h"

namespace interflow {

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

// 32 columns of one stage, fewer at its end.
struct Block {
  int stage;
  int64_t d, end;
  bool whole;  // 32 of them, which 16-byte loads reach
};
__device__ __forceinline__ Block block_of(const HeadTail& T, int number) {
  int i = 0;
  while (number >= T.first_block[i + 1]) ++i;
  int64_t d = T.begin[i] + int64_t(number - T.first_block[i]) * kBlockColumns, end = T.begin[i + 1];
  return {i, d, end, T.vectors && d + kBlockColumns <= end};
}

// Shared memory of a tile of NT * 8 classes: A [n, NT * 8], offsets [NT * 8], y's shares [warps, 16, NT * 8], with branches z's shares
// [n, warps, 16, NT * 8], and each warp's rows of pooled and weight [warps, 16 + NT * 8, kPitch].
template <int NT>
struct TailShared {
  float *a, *offset, *y, *z, *blocks;
  static constexpr int kOutputs = kTileImages * NT * 8;
  static constexpr int kPitch = kBlockColumns + 4;
  static constexpr int kBlockFloats = (kTileImages + NT * 8) * kPitch;
  __device__ __forceinline__ TailShared(float* shared, int n, bool branches)
      : a(shared), offset(a + n * NT * 8), y(offset + NT * 8), z(y + kWarps * kOutputs), blocks(z + (branches ? n * kWarps * kOutputs : 0)) {}
  static INTERFLOW_HOST_DEVICE constexpr int floats(int n, bool branches) {
    return n * NT * 8 + NT * 8 + kWarps * kOutputs + (branches ? n * kWarps * kOutputs : 0) + kWarps * kBlockFloats;
  }
};

// A block's rows of pooled, then of weight, into the warp's shared memory, element by element, 0 beyond the stage's end: for blocks that are not whole.
template <class W, int NT>
__device__ __forceinline__ void stage_rows(const HeadTail& T, const Tile& tile, const Block& block, float* shared, int lane) {
  int64_t d = block.d + lane;
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < kTileImages + NT * 8; ++r) {
    float x = 0;
    if (d < block.end && r < kTileImages) x = load_shared_result(T.pooled + (tile.image + min(r, tile.images - 1)) * T.width + d);
    if (d < block.end && r >= kTileImages) x = to_float(static_cast<const W*>(T.weight)[(tile.klass + min(r - kTileImages, tile.classes - 1)) * T.width + d]);
    shared[r * TailShared<NT>::kPitch + lane] = x;
  }
  __syncwarp();
}

// A warp's product of one block, [16, NT * 8] in registers: entry r of a lane is output (row(lane, r), column(lane, r)). load() brings it from memory, 16 bytes at
// a time where the block is whole, run() multiplies.
template <class W, int NT>
struct BlockProduct;

// Tensor cores. A lane loads 16 bytes of a row of weight, 8 columns, and gives each to another instruction: the columns of a block are
// numbered so that lane j's elements 2s and 2s + 1 are the inner indices j and j + 4 of instruction s.
template <class W, int NT>
struct TensorProduct {
  static constexpr int kAtOnce = NT == 1 ? 2 : 1;  // blocks loaded together
  static __device__ __forceinline__ int row(int lane, int r) { return lane / 4 + (r & 2 ? 8 : 0); }
  static __device__ __forceinline__ int column(int lane, int r) { return r / 4 * 8 + lane % 4 * 2 + (r & 1); }

  float p[2][8];
  RawVector<W, 8> w[NT];

  __device__ __forceinline__ void load(const HeadTail& T, const Tile& tile, const Block& block, float* shared, int lane) {
    if (block.whole) {
      int64_t d = block.d + lane % 4 * 8;
      const float* pooled = T.pooled + tile.image * T.width + d;
      const W* weight = static_cast<const W*>(T.weight) + tile.klass * T.width + d;
#pragma unroll
      for (int h = 0; h < 2; ++h) pooled_elements(p[h], pooled + min(lane / 4 + 8 * h, tile.images - 1) * T.width);
#pragma unroll
      for (int t = 0; t < NT; ++t) w[t] = *reinterpret_cast<const RawVector<W, 8>*>(weight + min(8 * t + lane / 4, tile.classes - 1) * T.width);
      return;
    }
    stage_rows<W, NT>(T, tile, block, shared, lane);
    const float* own = shared + lane / 4 * TailShared<NT>::kPitch + lane % 4 * 8;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
#pragma unroll
      for (int h = 0; h < 2; ++h) p[h][e] = own[8 * h * TailShared<NT>::kPitch + e];
#pragma unroll
      for (int t = 0; t < NT; ++t) w[t].set(e, from_float<W>(own[(kTileImages + 8 * t) * TailShared<NT>::kPitch + e]));
    }
  }

  // Instruction s: x[e] as the fragment of 16 rows has it, weights(t, e) of every 8 classes. Low halves are summed apart, which loses less of them.
  template <class Weights>
  static __device__ __forceinline__ void step(float (&high)[NT][4], float (&low)[NT][4], const float (&x)[4], Weights weights) {
    uint32_t upper[4], lower[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      upper[e] = to_tf32(x[e]);
      float rest = x[e] - __uint_as_float(upper[e]);
      lower[e] = to_tf32(fabsf(rest) < INFINITY ? rest : 0.0f);  // of infinities, NaN and what rounds to one there is no rest
    }
#pragma unroll
    for (int t = 0; t < NT; ++t) {
      uint32_t b[2] = {__float_as_uint(weights(t, 0)), __float_as_uint(weights(t, 1))};
      mma_16x8x8_tf32(high[t], upper, b);
      mma_16x8x8_tf32(low[t], lower, b);
    }
  }

  __device__ __forceinline__ void run(float (&out)[NT * 4], const HeadTail&, const Tile&, const Block&, float*, int) const {
    float high[NT][4] = {}, low[NT][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s)
      step(high, low, {p[0][2 * s], p[1][2 * s], p[0][2 * s + 1], p[1][2 * s + 1]}, [&](int t, int e) { return w[t].element(2 * s + e); });
#pragma unroll
    for (int t = 0; t < NT; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) out[4 * t + e] = high[t][e] + low[t][e];
  }
};
template <int NT>
struct BlockProduct<__nv_bfloat16, NT> : TensorProduct<__nv_bfloat16, NT> {};
template <int NT>
struct BlockProduct<__half, NT> : TensorProduct<__half, NT> {};

// Multiply-adds, from blocks in the warp's own shared memory. A lane has 4 rows and NT classes.
template <int NT>
struct BlockProduct<float, NT> {
  static constexpr int kAtOnce = NT == 1 ? 2 : 1;
  static constexpr int kPitch = TailShared<NT>::kPitch, kRows = kTileImages + NT * 8;
  static __device__ __forceinline__ int row(int lane, int r) { return lane / 8 * 4 + r % 4; }
  static __device__ __forceinline__ int column(int lane, int r) { return lane % 8 + r / 4 * 8; }

  Vector<float, 4> x[kRows / 4];  // of rows lane / 8 + 4 j, columns 4 (lane % 8) on: first of pooled, then of weight

  __device__ __forceinline__ void load(const HeadTail& T, const Tile& tile, const Block& block, float*, int lane) {
    if (!block.whole) return;  // run() brings it, straight to where it is needed
    int r = lane / 8, d = lane % 8 * 4;
    const float *pooled = T.pooled + tile.image * T.width + block.d + d, *weight = static_cast<const float*>(T.weight) + tile.klass * T.width + block.d + d;
#pragma unroll
    for (int j = 0; j < 4; ++j) x[j] = load_shared_result(reinterpret_cast<const Vector<float, 4>*>(pooled + min(r + 4 * j, tile.images - 1) * T.width));
#pragma unroll
    for (int j = 0; j < 2 * NT; ++j) x[4 + j] = *reinterpret_cast<const Vector<float, 4>*>(weight + min(r + 4 * j, tile.classes - 1) * T.width);
  }

  __device__ __forceinline__ void run(float (&out)[NT * 4], const HeadTail& T, const Tile& tile, const Block& block, float* shared, int lane) const {
    if (block.whole) {
      __syncwarp();
#pragma unroll
      for (int j = 0; j < kRows / 4; ++j) *reinterpret_cast<Vector<float, 4>*>(shared + (lane / 8 + 4 * j) * kPitch + lane % 8 * 4) = x[j];
      __syncwarp();
    } else {
      stage_rows<float, NT>(T, tile, block, shared, lane);
    }

#pragma unroll
    for (int r = 0; r < NT * 4; ++r) out[r] = 0;
#pragma unroll 1
    for (int k = 0; k < kBlockColumns; k += 4) {
      Vector<float, 4> p[4];
#pragma unroll
      for (int h = 0; h < 4; ++h) p[h] = *reinterpret_cast<const Vector<float, 4>*>(shared + (lane / 8 * 4 + h) * kPitch + k);
#pragma unroll
      for (int t = 0; t < NT; ++t) {
        auto w = *reinterpret_cast<const Vector<float, 4>*>(shared + (kTileImages + 8 * t + lane % 8) * kPitch + k);
#pragma unroll
        for (int h = 0; h < 4; ++h)
#pragma unroll
          for (int e = 0; e < 4; ++e) out[4 * t + h] = fmaf(p[h][e], w[e], out[4 * t + h]);
      }
    }
  }
};

// A of the tile's classes, and what does not depend on the image: sum_i A[i,k] b[i,k] + c[k]. Of the linear modes; ends with a barrier. Nothing of it waits for pooled values.
template <int NT>
__device__ __forceinline__ void prepare(const HeadTail& T, const Tile& tile, const TailShared<NT>& shared) {
  for (int j = threadIdx.x; j < T.count * NT * 8; j += kHeadThreads) {
    int i = j / (NT * 8), column = j - i * NT * 8;
    shared.a[j] = column < tile.classes ? aggregation(T, i, tile.klass + column) : 0.0f;
  }
  __syncthreads();
  if (threadIdx.x < tile.classes) {
    int64_t klass = tile.klass + threadIdx.x;
    float sum = aggregation_offset(T, klass);
    if (T.bias.data)
#pragma unroll 1
      for (int i = 0; i < T.count; ++i) sum = fmaf(shared.a[i * NT * 8 + threadIdx.x], parameter(T.bias, i * T.classes + klass), sum);
    shared.offset[threadIdx.x] = sum;
  }
  __syncthreads();
}

// Every warp's shares of y (where `linear`, after prepare) and of z (where Branches) -> shared memory. Ends without a barrier.
template <class W, int NT, bool Branches>
__device__ __forceinline__ void multiply(const HeadTail& T, const Tile& tile, const TailShared<NT>& shared, bool linear) {
  using Product = BlockProduct<W, NT>;
  constexpr int kOutputs = TailShared<NT>::kOutputs, kAtOnce = Product::kAtOnce;
  int thread = from_here(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp, blocks = T.first_block[T.count], stage = 0;
  float *staged = shared.blocks + warp * TailShared<NT>::kBlockFloats, y[NT * 4] = {}, z[NT * 4] = {};
  // z's share of a stage is complete
  auto flush = [&] {
#pragma unroll
    for (int r = 0; r < NT * 4; ++r) {
      shared.z[(stage * kWarps + warp) * kOutputs + Product::row(lane, r) * NT * 8 + Product::column(lane, r)] = z[r];
      z[r] = 0;
    }
    ++stage;
  };

#pragma unroll 1
  for (int first = warp; first < blocks; first += kAtOnce * kWarps) {
    // Loads
    Product product[kAtOnce] = {};  // also what is not loaded: registers that may be undefined are kept through the whole kernel
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      Block block = block_of(T, min(first + u * kWarps, blocks - 1));
      if (first + u * kWarps < blocks) product[u].load(T, tile, block, staged, lane);
    }

    // Products
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * kWarps >= blocks) break;
      Block block = block_of(T, first + u * kWarps);
      float share[NT * 4];
      product[u].run(share, T, tile, block, staged, lane);
      if constexpr (Branches)
        while (stage < block.stage) flush();
#pragma unroll
      for (int r = 0; r < NT * 4; ++r) {
        if (linear) y[r] = fmaf(shared.a[block.stage * NT * 8 + Product::column(lane, r)], share[r], y[r]);
        if constexpr (Branches) z[r] += share[r];
      }
    }
  }
  if constexpr (Branches)
    while (stage < T.count) flush();
  if (linear)
#pragma unroll
    for (int r = 0; r < NT * 4; ++r) shared.y[warp * kOutputs + Product::row(lane, r) * NT * 8 + Product::column(lane, r)] = y[r];
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
