// interflow_head, backward: at most three launches, none of which writes anything of a feature map's size.
//
//   ds[b,i,k] = A[i,k] dy[b,k] + dZ[b,i,k], or the gate's gradient: the gradient of Z
//   dp_i = ds_i W_i        dW_i = ds_i^T p_i        db[i,k] = sum_b ds[b,i,k]        dA[i,k] = sum_b dy[b,k] Z[b,i,k]
//
// 1 scores    only where Z is needed: for the gates (ds, and the terms of dM and dc), and for dA where dZ comes in
// 2 products  dp and dW. With G = dy^T p a linear mode without dZ has dW_i = A_i G_i and dA[i,k] = W_i[k,:] . G_i[k,:] + b_i[k] sum_b dy[b,k]: no Z
// 3 epilogue  db, dA and dc, from sums over the batch and from the terms that the first two left
// Every sum has one fixed order, in which the batch plays no part for an image's own gradients.
#include "interflow_head_tail.cuh"
#include "launch.h"

namespace interflow {
namespace {

constexpr int kNarrowTiles = kNarrowClasses / 8;
using ScoreShared = TailShared<kNarrowTiles>;
constexpr int kOutputs = ScoreShared::kOutputs, kStage = kWarps * kOutputs;

// ds[b, i, k]: from memory where the scores kernel left it, else by the definition.
__device__ __forceinline__ float score_gradient(const HeadBackward& P, int64_t b, int i, int64_t k) {
  const HeadTail& T = P.tail;
  int64_t place = (b * T.count + i) * T.classes + k;
  if (P.dscores) return P.dscores[place];
  float ds = P.dy.data ? aggregation(T, i, k) * parameter(P.dy, b * T.classes + k) : 0.0f;
  return P.dbranches.data ? ds + parameter(P.dbranches, place) : ds;
}

// --- 1 scores ----------------------------------------------------------------------------------------------------------------

// Gates: ds_i = dy g_i (z_i - y) is the gradient of the softmax's argument i, dz_i = dy g_i + sum_l M_li ds_l. Leaves ds in the third warp's share, z in the first.
__device__ __forceinline__ void gate_gradient(const HeadBackward& P, const ScoreShared& shared, int o, int64_t image, int64_t klass, bool inside) {
  const HeadTail& T = P.tail;
  int n = T.count;
  float y = finish_gates(T, shared, o), dy = inside ? parameter(P.dy, image * T.classes + klass) : 0.0f;
  float *z = shared.z + o, *gate = z + kOutputs, *ds = z + 2 * kOutputs;
#pragma unroll 1
  for (int i = 0; i < n; ++i) ds[i * kStage] = inside ? dy * gate[i * kStage] * (z[i * kStage] - y) : 0.0f;
  if (!inside) return;
#pragma unroll 1
  for (int i = 0; i < n; ++i) {
    float dz = dy * gate[i * kStage];
#pragma unroll 1
    for (int l = 0; l < n; ++l) dz = fmaf(parameter(T.attention_weight, l * n + i), ds[l * kStage], dz);
    int64_t place = (image * n + i) * T.classes + klass;
    P.dscores[place] = P.dbranches.data ? dz + parameter(P.dbranches, place) : dz;
  }
}

template <class W>
__device__ __forceinline__ void score_tile(const HeadBackward& P, unsigned number, float* scratch) {
  const HeadTail& T = P.tail;
  int n = T.count;
  unsigned tiles = unsigned(ceil_div(T.classes, kNarrowClasses)), group = number / tiles;
  int64_t first = int64_t(group) * kTileImages, klass0 = int64_t(number - group * tiles) * kNarrowClasses;
  ScoreShared shared(scratch, n);
  Tile tile{first, klass0, int(min(int64_t(kTileImages), T.batch - first)), int(min(int64_t(kNarrowClasses), T.classes - klass0))};
  multiply<W>(T, tile, shared, true);
  __syncthreads();

  // Z, and from it ds or dy z
  int o = threadIdx.x;
  if (o < kOutputs) {
    int row = o / kNarrowClasses, column = o % kNarrowClasses;
    bool inside = row < tile.images && column < tile.classes;
    int64_t image = first + row, klass = klass0 + column;
    finish_scores(T, shared, o, inside ? klass : klass0);
    if (T.mode == Attention::Gated) {
      gate_gradient(P, shared, o, image, klass, inside);
    } else {
      float dy = inside ? parameter(P.dy, image * T.classes + klass) : 0.0f;
#pragma unroll 1
      for (int i = 0; i < n; ++i) shared.z[i * kStage + o] = inside ? dy * shared.z[i * kStage + o] : 0.0f;
    }
  }
  __syncthreads();

  // Their sums over the tile
  if (T.mode == Attention::Gated) {
    int terms = n * n + n;
    for (int t = threadIdx.x; t < terms; t += kHeadThreads) {
      int i = t < n * n ? t / n : t - n * n, j = t < n * n ? t % n : -1;
      const float *ds = shared.z + i * kStage + 2 * kOutputs, *z = shared.z + j * kStage;
      float sum = 0;
      for (int p = 0; p < kOutputs; ++p) sum = j < 0 ? sum + ds[p] : fmaf(ds[p], z[p], sum);
      P.gate_terms[int64_t(number) * terms + t] = sum;
    }
  } else {
    for (int t = threadIdx.x; t < n * tile.classes; t += kHeadThreads) {
      int i = t / tile.classes, column = t - i * tile.classes;
      float sum = 0;
      for (int row = 0; row < kTileImages; ++row) sum += shared.z[i * kStage + row * kNarrowClasses + column];
      P.score_terms[(int64_t(group) * n + i) * T.classes + klass0 + column] = sum;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_scores_kernel(const __grid_constant__ HeadBackward P) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  for (unsigned number = blockIdx.x; number < score_tiles(P.tail); number += gridDim.x) {
    switch (P.tail.weight_dtype) {
      case DType::BF16: score_tile<__nv_bfloat16>(P, number, scratch); break;
      case DType::F16: score_tile<__half>(P, number, scratch); break;
      default: score_tile<float>(P, number, scratch); break;
    }
  }
}

// --- 2 products --------------------------------------------------------------------------------------------------------------

constexpr int kChunk = 256;                                              // inner indices that share a stay in shared memory
constexpr int kPitch = kChunk + 1;                                       // off the banks
constexpr int kPooledFloats = kWarps * kProductImages * kProductColumns;  // the larger of the two tiles' needs
constexpr int kBatchChunk = 32;

// Which stage, and which of its columns, tile `number` over all stages is.
struct ColumnTile {
  int stage;
  int64_t begin, end;
};
__device__ __forceinline__ ColumnTile columns_of(const HeadTail& T, int64_t number, int columns) {
  int i = 0;
  while (i + 1 < T.count && number >= column_tiles(T, i, columns)) number -= column_tiles(T, i++, columns);
  int64_t begin = T.begin[i] + number * columns;
  return {i, begin, min(begin + columns, T.begin[i + 1])};
}

// N of a row's elements from column d on as floats, 0 from `end` on; whole vectors where aligned and inside.
template <class W, int N>
__device__ __forceinline__ void weight_elements(float (&x)[N], const W* row, int64_t d, int64_t end, bool vectors) {
  if (vectors && d + N <= end) {
    constexpr int kEach = 16 / int(sizeof(W)) < N ? 16 / int(sizeof(W)) : N;
#pragma unroll
    for (int e = 0; e < N; e += kEach) {
      auto some = *reinterpret_cast<const Vector<W, kEach>*>(row + d + e);
#pragma unroll
      for (int f = 0; f < kEach; ++f) x[e + f] = to_float(some[f]);
    }
    return;
  }
#pragma unroll
  for (int e = 0; e < N; ++e) x[e] = d + e < end ? to_float(row[d + e]) : 0.0f;
}

// dp of 16 images and 64 columns. The warps share the classes; a lane has 4 images and 8 columns.
template <class W>
__device__ __forceinline__ void pooled_tile(const HeadBackward& P, unsigned number, float* scratch) {
  const HeadTail& T = P.tail;
  unsigned tiles = unsigned(all_column_tiles(T, kProductColumns)), group = number / tiles;
  int64_t first = int64_t(group) * kProductImages;
  ColumnTile at = columns_of(T, number - group * tiles, kProductColumns);
  int images = int(min(int64_t(kProductImages), T.batch - first)), columns = int(at.end - at.begin);
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row0 = lane / 8 * 4, column0 = lane % 8 * 8;

  float sums[4][8] = {};
  if (P.stages[at.stage]) {
    for (int64_t k0 = 0; k0 < T.classes; k0 += kChunk) {
      // ds of a chunk of classes into shared memory
      int chunk = int(min(int64_t(kChunk), T.classes - k0));
      for (int j = threadIdx.x; j < kProductImages * kChunk; j += kHeadThreads) {
        int row = j / kChunk, k = j % kChunk;
        scratch[row * kPitch + k] = row < images && k < chunk ? score_gradient(P, first + row, at.stage, k0 + k) : 0.0f;
      }
      __syncthreads();

      // Own classes
#pragma unroll 4
      for (int k = warp; k < chunk; k += kWarps) {
        float w[8];
        weight_elements<W, 8>(w, static_cast<const W*>(T.weight) + (k0 + k) * T.width, at.begin + column0, at.end, T.vectors);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float ds = scratch[(row0 + r) * kPitch + k];
#pragma unroll
          for (int e = 0; e < 8; ++e) sums[r][e] = fmaf(ds, w[e], sums[r][e]);
        }
      }
      __syncthreads();
    }
  }

  // All warps
  float* shares = scratch + warp * kProductImages * kProductColumns;
#pragma unroll
  for (int r = 0; r < 4; ++r)
#pragma unroll
    for (int e = 0; e < 8; ++e) shares[(row0 + r) * kProductColumns + column0 + e] = sums[r][e];
  __syncthreads();
  for (int o = threadIdx.x; o < kProductImages * kProductColumns; o += kHeadThreads) {
    int row = o / kProductColumns, column = o % kProductColumns;
    if (row >= images || column >= columns) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kProductImages * kProductColumns + o];
    P.dpooled[(first + row) * T.width + at.begin + column] = sum;
  }
  __syncthreads();
}

// dW of 64 classes and 128 columns. The warps share the classes; a lane has 8 of them and 4 columns.
template <class W>
__device__ __forceinline__ void weight_tile(const HeadBackward& P, unsigned number, float* scratch) {
  const HeadTail& T = P.tail;
  unsigned class_tiles = unsigned(ceil_div(T.classes, kWeightClasses)), tile = number / class_tiles;
  int64_t k0 = int64_t(number - tile * class_tiles) * kWeightClasses;
  ColumnTile at = columns_of(T, tile, kWeightColumns);
  int classes = int(min(int64_t(kWeightClasses), T.classes - k0));
  int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, own = warp * 8;
  int64_t d = at.begin + 4 * lane;
  bool products = P.product_terms != nullptr;  // then sums are of dy, and A comes in at the end

  float sums[8][4] = {};
  for (int64_t b0 = 0; b0 < T.batch; b0 += kBatchChunk) {
    int chunk = int(min(int64_t(kBatchChunk), T.batch - b0));
    for (int j = threadIdx.x; j < kBatchChunk * kWeightClasses; j += kHeadThreads) {
      int b = j / kWeightClasses, k = j % kWeightClasses;
      bool inside = b < chunk && k < classes;
      scratch[j] = !inside ? 0.0f : products ? parameter(P.dy, (b0 + b) * T.classes + k0 + k) : score_gradient(P, b0 + b, at.stage, k0 + k);
    }
    __syncthreads();
#pragma unroll 4
    for (int b = 0; b < chunk; ++b) {
      float p[4];
      weight_elements<float, 4>(p, T.pooled + (b0 + b) * T.width, d, at.end, T.vectors);
#pragma unroll
      for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[k][e] = fmaf(scratch[b * kWeightClasses + own + k], p[e], sums[k][e]);
    }
    __syncthreads();
  }

#pragma unroll
  for (int k = 0; k < 8; ++k) {
    bool inside = own + k < classes;
    int64_t klass = inside ? k0 + own + k : k0, row = klass * T.width;
    if (products) {
      // W . G over the tile's columns
      float w[4], dot = 0;
      weight_elements<W, 4>(w, static_cast<const W*>(T.weight) + row, d, at.end, T.vectors);
#pragma unroll
      for (int e = 0; e < 4; ++e) dot = fmaf(w[e], sums[k][e], dot);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(~0u, dot, distance);
      if (lane == 0 && inside) P.product_terms[int64_t(tile) * T.classes + klass] = dot;
    }
    if (P.dweight && inside) {
      float a = products ? aggregation(T, at.stage, klass) : 1.0f;
      W* out = static_cast<W*>(P.dweight) + row;
      if (T.vectors && d + 4 <= at.end) {
        Vector<W, 4> four;
#pragma unroll
        for (int e = 0; e < 4; ++e) four[e] = from_float<W>(a * sums[k][e]);
        *reinterpret_cast<Vector<W, 4>*>(out + d) = four;
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (d + e < at.end) out[d + e] = from_float<W>(a * sums[k][e]);
      }
    }
  }
}

__device__ __host__ __forceinline__ int64_t pooled_tiles(const HeadBackward& P) {
  return P.dpooled ? ceil_div(P.tail.batch, kProductImages) * all_column_tiles(P.tail, kProductColumns) : 0;
}
__device__ __host__ __forceinline__ int64_t weight_tiles(const HeadBackward& P) {
  return P.dweight || P.product_terms ? ceil_div(P.tail.classes, kWeightClasses) * all_column_tiles(P.tail, kWeightColumns) : 0;
}

template <class W>
__device__ __forceinline__ void product_tiles(const HeadBackward& P, float* scratch) {
  unsigned pooled = unsigned(pooled_tiles(P)), all = pooled + unsigned(weight_tiles(P));
  for (unsigned number = blockIdx.x; number < all; number += gridDim.x) {
    if (number < pooled)
      pooled_tile<W>(P, number, scratch);
    else
      weight_tile<W>(P, number - pooled, scratch);
  }
}

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_products_kernel(const __grid_constant__ HeadBackward P) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  switch (P.tail.weight_dtype) {
    case DType::BF16: product_tiles<__nv_bfloat16>(P, scratch); break;
    case DType::F16: product_tiles<__half>(P, scratch); break;
    default: product_tiles<float>(P, scratch); break;
  }
}

// --- 3 epilogue --------------------------------------------------------------------------------------------------------------

constexpr int kReaders = kHeadThreads / kEpilogueClasses;  // threads that share a class's sum over the batch

// sum over the batch of f(b), by kReaders threads a class and then in order; the result in the first reader.
template <class F>
__device__ __forceinline__ float sum_batch(int64_t batch, int klass, int reader, float* scratch, F f) {
  float sum = 0;
#pragma unroll 4
  for (int64_t b = reader; b < batch; b += kReaders) sum += f(b);
  scratch[reader * kEpilogueClasses + klass] = sum;
  __syncthreads();
  sum = 0;
  if (reader == 0)
    for (int r = 0; r < kReaders; ++r) sum += scratch[r * kEpilogueClasses + klass];
  __syncthreads();
  return sum;
}

// dA[i, k] from what the products or the scores kernel left.
__device__ __forceinline__ float aggregation_gradient(const HeadBackward& P, int i, int64_t k, float dy_sum) {
  const HeadTail& T = P.tail;
  float sum = 0;
  if (P.product_terms) {
    int64_t first = 0;
    for (int j = 0; j < i; ++j) first += column_tiles(T, j, kWeightColumns);
    for (int64_t t = 0; t < column_tiles(T, i, kWeightColumns); ++t) sum += P.product_terms[(first + t) * T.classes + k];
    return T.bias.data ? fmaf(parameter(T.bias, i * T.classes + k), dy_sum, sum) : sum;
  }
  for (int64_t g = 0; g < ceil_div(T.batch, kTileImages); ++g) sum += P.score_terms[(g * T.count + i) * T.classes + k];
  return sum;
}

// Terms of the parameters that have no class of their own, one of [n * n + n + 1]: first a block's, then the last block's sums of all blocks'.
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

__device__ __forceinline__ void epilogue_block(const HeadBackward& P, float* scratch, uint32_t* flag) {
  const HeadTail& T = P.tail;
  int n = T.count, klass = threadIdx.x % kEpilogueClasses, reader = threadIdx.x / kEpilogueClasses;
  int64_t k = int64_t(blockIdx.x) * kEpilogueClasses + klass;
  bool inside = k < T.classes, gated = T.mode == Attention::Gated, by_class = T.mode == Attention::Classwise || T.mode == Attention::Folded;
  bool attention = P.dattention_weight || P.dattention_bias;
  float* shares = scratch + kHeadThreads;  // [n + 1, classes]: dA and the sum of dy, to be added over classes

  // Sums over the batch
  float dy_sum = 0;
  if (P.dy.data && !gated) dy_sum = sum_batch(inside ? T.batch : 0, klass, reader, scratch, [&](int64_t b) { return parameter(P.dy, b * T.classes + k); });
  if (P.dbias) {
    for (int i = 0; i < n; ++i) {
      float sum = 0;
      if (P.dscores || P.dbranches.data)
        sum = sum_batch(inside ? T.batch : 0, klass, reader, scratch, [&](int64_t b) { return score_gradient(P, b, i, k); });
      else if (inside && reader == 0)
        sum = aggregation(T, i, k) * dy_sum;
      if (inside && reader == 0) store_float(P.dbias, T.bias.dtype, i * T.classes + k, sum);
    }
  }
  if (!attention) return;

  // The attention's, class by class, or this block's share of their sums over classes
  int terms = gated ? n * n + n : by_class ? 0 : n + 1;
  float* own = P.epilogue_terms + int64_t(blockIdx.x) * terms;
  if (gated) {
    unsigned tiles = unsigned(score_tiles(T)), each = (tiles + gridDim.x - 1) / gridDim.x, begin = blockIdx.x * each, end = min(begin + each, tiles);
    for (int t = threadIdx.x; t < terms; t += kHeadThreads) {
      float sum = 0;
#pragma unroll 4
      for (unsigned tile = begin; tile < end; ++tile) sum += P.gate_terms[int64_t(tile) * terms + t];
      own[t] = sum;
    }
  } else {
    if (reader == 0) scratch[klass] = dy_sum;
    __syncthreads();
    float sum_of_dy = scratch[klass];
    __syncthreads();
    for (int i = reader; i < n; i += kReaders) {
      float da = inside && P.dattention_weight ? aggregation_gradient(P, i, k, sum_of_dy) : 0.0f;
      if (!by_class) shares[i * kEpilogueClasses + klass] = da;
      if (by_class && inside && P.dattention_weight) store_float(P.dattention_weight, T.attention_weight.dtype, i * T.classes + k, da);
    }
    if (reader == 0 && by_class && inside && P.dattention_bias) store_float(P.dattention_bias, T.attention_bias.dtype, k, dy_sum);
    if (by_class) return;
    if (reader == 0) shares[n * kEpilogueClasses + klass] = inside ? dy_sum : 0.0f;
    __syncthreads();
    if (int(threadIdx.x) <= n) {
      float sum = 0;
      for (int c = 0; c < kEpilogueClasses; ++c) sum += shares[threadIdx.x * kEpilogueClasses + c];
      own[threadIdx.x] = sum;
    }
  }
  __syncthreads();

  // The last block adds up all blocks'
  if (threadIdx.x == 0) {
    bool last = atomic_add_acq_rel(P.counters, 1) + 1 == gridDim.x;
    if (last) store_relaxed(P.counters, 0);
    *flag = last;
  }
  __syncthreads();
  if (!*flag) return;
  for (int t = threadIdx.x; t < terms; t += kHeadThreads) {
    float sum = 0;
#pragma unroll 4
    for (unsigned block = 0; block < gridDim.x; ++block) sum += load_shared_result(P.epilogue_terms + int64_t(block) * terms + t);
    store_shared_parameters(P, t, sum);
  }
}

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_epilogue_kernel(const __grid_constant__ HeadBackward P) {
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared_memory());
  epilogue_block(P, reinterpret_cast<float*>(shared_memory()) + 4, flag);
}

}  // namespace

cudaError_t launch_head_scores(const HeadBackward& P, cudaStream_t stream) {
  int bytes = 4 * ScoreShared::floats(P.tail.count, true);
  cudaError_t error;
  int64_t blocks = resident_blocks(interflow_head_scores_kernel, kHeadThreads, bytes, &error);
  if (error != cudaSuccess) return error;
  return launch(interflow_head_scores_kernel, {blocks < score_tiles(P.tail) ? blocks : score_tiles(P.tail), kHeadThreads, bytes, stream}, P);
}

cudaError_t launch_head_products(const HeadBackward& P, cudaStream_t stream) {
  constexpr int bytes = 4 * (kPooledFloats > kProductImages * kPitch ? kPooledFloats : kProductImages * kPitch);
  cudaError_t error;
  int64_t blocks = resident_blocks(interflow_head_products_kernel, kHeadThreads, bytes, &error), tiles = pooled_tiles(P) + weight_tiles(P);
  if (error != cudaSuccess || tiles == 0) return error;
  return launch(interflow_head_products_kernel, {blocks < tiles ? blocks : tiles, kHeadThreads, bytes, stream}, P);
}

cudaError_t launch_head_epilogue(const HeadBackward& P, cudaStream_t stream) {
  int bytes = 4 * (4 + kHeadThreads + (P.tail.count + 1) * kEpilogueClasses);
  return launch(interflow_head_epilogue_kernel, {epilogue_blocks(P.tail), kHeadThreads, bytes, stream}, P);
}

}  // namespace interflow
