// Backward, second kernel: tiles of dp_i = ds_i W_i, whose inner index is the class, and of dW_i = ds_i^T p_i, whose inner index is the image.
//
// dp with weights in bf16 or fp16 goes through the tensor cores: they are TF32 numbers exactly, and ds is split into two of those, as pooled is in the
// forward tail. All else goes through multiply-adds. Every loop issues a batch of loads before it uses the first, and takes apart what came only where it
// is used. The order of dp's sums depends on K alone, that of dW's on B.
#pragma once
#include "interflow_head/cuda/gradient.cuh"

namespace interflow {

// Which stage, and which of its columns, tile `number` over all stages is.
struct ColumnTile {
  int stage, begin, end;
};
__device__ __forceinline__ ColumnTile columns_of(const HeadTail& T, const int (&first)[kMaxStages + 1], int number, int columns) {
  int i = 0;
  while (number >= first[i + 1]) ++i;
  int begin = int(T.begin[i]) + (number - first[i]) * columns;
  return {i, begin, min(begin + columns, int(T.begin[i + 1]))};
}

// N of a row's elements from column d on. Whole: as one vector, and another one of the same stage where d is beyond its end, for columns that nobody
// stores; else element by element, 0 beyond the end. 0 where `inside` is false.
template <bool Whole, int N, class W>
__device__ __forceinline__ RawVector<W, N> row_elements(const W* row, int d, int end, bool inside) {
  RawVector<W, N> x;
  if constexpr (Whole) {
    auto words = load_if<N * int(sizeof(W))>(inside, row + min(d, end - N));
#pragma unroll
    for (int i = 0; i < N * int(sizeof(W)) / 4; ++i) x.words[i] = words.at[i];
  } else {
#pragma unroll
    for (int e = 0; e < N; ++e) {
      W one = from_float<W>(0.0f);
      if (inside && d + e < end) one = row[d + e];
      x.set(e, one);
    }
  }
  return x;
}

// Calls f(W(), Whole()): the weight's type, and whether whole vectors may be loaded.
template <bool Value>
struct Constant {
  static constexpr bool value = Value;
};
template <class F>
__device__ __forceinline__ void with_weight(const HeadTail& T, F f) {
  auto typed = [&](auto w) {
    if (T.vectors)
      f(w, Constant<true>());
    else
      f(w, Constant<false>());
  };
  switch (T.weight_dtype) {
    case DType::BF16: typed(__nv_bfloat16()); break;
    case DType::F16: typed(__half()); break;
    default: typed(float()); break;
  }
}

// --- dp: 16 images and 32 columns --------------------------------------------------------------------------------------------

constexpr int kChunk = 512;                 // classes whose ds is in shared memory
constexpr int kPitch = kChunk + 4;          // a fragment's rows on different banks
constexpr int kSharePitch = kProductColumns + 4;
constexpr int kShare = kProductImages * kSharePitch;
constexpr int kStagedFloats = kWarps * kShare > kProductImages * kPitch ? kWarps * kShare : kProductImages * kPitch;

// Where the tile is, in shared memory behind ds: read again after every barrier, so that registers are left to sums and loads.
struct PooledPlace {
  ColumnTile columns;
  int first, images;  // images
  float a;            // A[i], where it is the same for all classes
};
constexpr int kPooledFloats = kStagedFloats + int(sizeof(PooledPlace) / sizeof(float));

// A lane's part of a warp's [16, 32] sums: quad q is columns column(q) to column(q) + 3 of image row(q), at 4 q. A warp takes kClasses classes in
// turn, 1 / kParts of them at a time: add() loads all their weights, then multiplies. ds: [16, kPitch] in shared memory from the first of them on.
template <class W, bool Whole>
struct PooledProduct;

// Tensor cores, steps of 8 classes. Of step s lane (g, j) loads columns 4 g to 4 g + 3 of classes j and j + 4, and gives
// each to another instruction: instruction t multiplies columns t, 4 + t, 8 + t, ...
template <class W, bool Whole>
struct TensorPooledProduct {
  static constexpr int kClasses = 64, kParts = Whole ? 2 : 8, kSteps = kClasses / kParts / 8;
  static __device__ __forceinline__ int row(int q) { return int(threadIdx.x) % kWarp / 4 + q / 2 * 8; }
  static __device__ __forceinline__ int column(int q) { return int(threadIdx.x) % 4 * 8 + q % 2 * 4; }

  static __device__ __forceinline__ void add(float (&sums)[16], const HeadTail& T, const ColumnTile& at, int k, const float* ds) {
    int lane = threadIdx.x % kWarp, classes = int(T.classes);
    k += lane % 4;
    const W* from = static_cast<const W*>(T.weight) + k * T.width;
    RawVector<W, 4> w[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int h = 0; h < 2; ++h, k += 4, from += 4 * T.width) w[s][h] = row_elements<Whole, 4>(from, at.begin + lane / 4 * 4, at.end, k < classes);

    ds += lane / 4 * kPitch + lane % 4;
#pragma unroll
    for (int s = 0; s < kSteps; ++s, ds += 8) {
      uint32_t high[4], low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float x = ds[e % 2 * 8 * kPitch + e / 2 * 4];
        high[e] = to_tf32(x);
        float rest = x - __uint_as_float(high[e]);
        low[e] = to_tf32(fabsf(rest) < INFINITY ? rest : 0.0f);  // of infinities, NaN and what rounds to one there is no rest
      }
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        uint32_t b[2] = {__float_as_uint(w[s][0].element(t)), __float_as_uint(w[s][1].element(t))};
        float c[4] = {};
        mma_16x8x8_tf32(c, low, b);
        mma_16x8x8_tf32(c, high, b);
        // The instruction's own sums are rounded towards zero, this one to nearest
#pragma unroll
        for (int r = 0; r < 4; ++r) sums[r / 2 * 8 + r % 2 * 4 + t] += c[r];
      }
    }
  }
};
template <bool Whole>
struct PooledProduct<__nv_bfloat16, Whole> : TensorPooledProduct<__nv_bfloat16, Whole> {};
template <bool Whole>
struct PooledProduct<__half, Whole> : TensorPooledProduct<__half, Whole> {};

// Multiply-adds. A lane has 4 images and 4 columns.
template <bool Whole>
struct PooledProduct<float, Whole> {
  static constexpr int kClasses = 8, kParts = 1;
  static __device__ __forceinline__ int row(int q) { return int(threadIdx.x) % kWarp / 8 + q * 4; }
  static __device__ __forceinline__ int column(int) { return int(threadIdx.x) % 8 * 4; }

  static __device__ __forceinline__ void add(float (&sums)[16], const HeadTail& T, const ColumnTile& at, int k, const float* ds) {
    const float* from = static_cast<const float*>(T.weight) + k * T.width;
    RawVector<float, 4> w[kClasses];
#pragma unroll
    for (int c = 0; c < kClasses; ++c, from += T.width) w[c] = row_elements<Whole, 4>(from, at.begin + column(0), at.end, k + c < int(T.classes));
#pragma unroll
    for (int c = 0; c < kClasses; ++c)
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        float x = ds[row(q) * kPitch + c];
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[4 * q + e] = fmaf(x, w[c].element(e), sums[4 * q + e]);
      }
  }
};

// ds of a chunk of classes into shared memory, 0 beyond images and classes. A thread has the 16 images of every 256th class. Weights come as far as L2.
__device__ __forceinline__ void stage_chunk(const HeadBackward& P, const PooledPlace& place, int k0, float* scratch) {
  const HeadTail& T = P.tail;
  int element = T.weight_dtype == DType::F32 ? 4 : 2, classes = int(T.classes);
#pragma unroll 1
  for (int k = threadIdx.x; k < kChunk; k += kHeadThreads)
    prefetch_l2(static_cast<const char*>(T.weight) + (min(k0 + k, classes - 1) * T.width + place.columns.begin) * element);
  bool by_class = scales_dy(P) && T.mode == Attention::Classwise;
#pragma unroll 1
  for (int k = threadIdx.x; k < kChunk; k += kHeadThreads) {
    bool inside = k0 + k < classes;
    float ds[kProductImages], a = by_class && inside ? parameter(T.attention_weight, place.columns.stage * T.classes + k0 + k) : place.a;
    score_gradients(ds, P, place.first, 1, inside ? place.images : 0, place.columns.stage, k0 + k, a);
#pragma unroll
    for (int r = 0; r < kProductImages; ++r) scratch[r * kPitch + k] = ds[r];
  }
}

// A chunk's products, whose classes the warps share.
template <class W, bool Whole>
__device__ __forceinline__ void add_chunk(float (&sums)[16], const HeadTail& T, const ColumnTile& at, int k0, const float* scratch) {
  using Product = PooledProduct<W, Whole>;
  int chunk = min(kChunk, int(T.classes) - k0);
#pragma unroll 1
  for (int k = int(threadIdx.x) / kWarp * Product::kClasses; k < chunk; k += kWarps * Product::kClasses)
#pragma unroll 1
    for (int part = 0; part < Product::kParts; ++part) {
      int own = k + part * (Product::kClasses / Product::kParts);
      Product::add(sums, T, at, k0 + own, scratch + own);
    }
}

template <class Product>
__device__ __forceinline__ void store_share(const float (&sums)[16], float* share) {
#pragma unroll
  for (int q = 0; q < 4; ++q)
    *reinterpret_cast<Vector<float, 4>*>(share + Product::row(q) * kSharePitch + Product::column(q)) = {sums[4 * q], sums[4 * q + 1], sums[4 * q + 2], sums[4 * q + 3]};
}

__device__ __forceinline__ void pooled_tile(const HeadBackward& P, unsigned number, float* scratch) {
  const HeadTail& T = P.tail;
  PooledPlace& place = *reinterpret_cast<PooledPlace*>(scratch + kStagedFloats);
  if (threadIdx.x == 0) {
    unsigned tiles = unsigned(P.pooled_tiles[T.count]), group = number / tiles;
    int first = int(group) * kProductImages;
    ColumnTile columns = columns_of(T, P.pooled_tiles, int(number - group * tiles), kProductColumns);
    place = {columns, first, min(kProductImages, int(T.batch) - first), scales_dy(P) && T.mode != Attention::Classwise ? stage_weight(T, columns.stage, 0) : 1.0f};
  }
  __syncthreads();

  float sums[16] = {};
  if (P.stages[place.columns.stage]) {
#pragma unroll 1
    for (int k0 = 0; k0 < int(T.classes); k0 += kChunk) {
      stage_chunk(P, place, k0, scratch);
      __syncthreads();
      with_weight(T, [&](auto w, auto whole) { add_chunk<decltype(w), decltype(whole)::value>(sums, T, place.columns, k0, scratch); });
      __syncthreads();
    }
  }

  // All warps
  float* share = scratch + int(threadIdx.x) / kWarp * kShare;
  if (T.weight_dtype == DType::F32)
    store_share<PooledProduct<float, true>>(sums, share);
  else
    store_share<PooledProduct<__half, true>>(sums, share);
  __syncthreads();
#pragma unroll
  for (int o = threadIdx.x; o < kProductImages * kProductColumns; o += kHeadThreads) {
    int row = o / kProductColumns, column = place.columns.begin + o % kProductColumns;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kShare + row * kSharePitch + o % kProductColumns];
    if (row < place.images && column < place.columns.end) P.dpooled[(place.first + row) * T.width + column] = sum;
  }
}

// --- dW: 64 classes and 128 columns ------------------------------------------------------------------------------------------

constexpr int kBatchChunk = 64;                // images whose ds is in shared memory, [64 classes, images]; behind it A of the tile's classes
constexpr int kBatchPitch = kBatchChunk + 4;
constexpr int kFactorsAt = kWeightClasses * kBatchPitch, kTotalsAt = kFactorsAt + kWeightClasses;
constexpr int kRows = 8;                       // images whose pooled values a lane loads at once
constexpr int kChunksToTotal = 4;              // chunks whose sums go to totals in shared memory, where there are more

// A long batch is summed in three levels: 8 images, 256 images, all: a chain of thousands of equal products would round each time the same way.
__device__ __host__ __forceinline__ bool has_totals(const HeadTail& T) { return T.batch > kBatchChunk * kChunksToTotal; }
inline int weight_floats(const HeadTail& T) { return kTotalsAt + (has_totals(T) ? 8 * 4 * kHeadThreads : 0); }

// Products of a chunk of images. The warps share the classes; a lane has 8 of them and 4 columns.
template <bool Whole>
__device__ __forceinline__ void add_images(float (&sums)[8][4], const HeadTail& T, int b0, int chunk, int d, int end, const float* own) {
#pragma unroll 1
  for (int b = 0; b < chunk; b += kRows) {
    RawVector<float, 4> p[kRows];
    const float* row = T.pooled + int64_t(b0 + b) * T.width;
#pragma unroll
    for (int r = 0; r < kRows; ++r, row += T.width) p[r] = row_elements<Whole, 4>(row, d, end, b + r < chunk);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float* ds = own + c * kBatchPitch + b;
      Vector<float, 4> of_images[2] = {*reinterpret_cast<const Vector<float, 4>*>(ds), *reinterpret_cast<const Vector<float, 4>*>(ds + 4)};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float sum = of_images[0][0] * p[0].element(e);
#pragma unroll
        for (int r = 1; r < kRows; ++r) sum = fmaf(of_images[r / 4][r % 4], p[r].element(e), sum);
        sums[c][e] += sum;
      }
    }
  }
}

// A thread's totals in shared memory: sums go there and start again; at the end they come back.
__device__ __forceinline__ void add_to_totals(float (&sums)[8][4], float* totals, bool is_first, bool is_last) {
#pragma unroll
  for (int i = 0; i < 8 * 4; ++i) {
    float& sum = sums[i / 4][i % 4];
    float* total = totals + i * kHeadThreads + threadIdx.x;
    float all = is_first ? sum : *total + sum;
    if (!is_last) *total = all;
    sum = is_last ? all : 0.0f;
  }
}

// W . G over the tile's columns, where sums are G, and dW. k: the lane's first class.
template <class W, bool Whole>
__device__ __forceinline__ void finish_weight(const float (&sums)[8][4], const HeadBackward& P, unsigned tile, int k, int d, int end, const float* factors) {
  const HeadTail& T = P.tail;
  if (P.product_terms) {
    RawVector<W, 4> w[8];
#pragma unroll
    for (int c = 0; c < 8; ++c) w[c] = row_elements<Whole, 4>(static_cast<const W*>(T.weight) + (k + c) * T.width, d, end, k + c < int(T.classes) && d < end);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float dot = 0;
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (d + e < end) dot = fmaf(w[c].element(e), sums[c][e], dot);
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(~0u, dot, distance);
      if (threadIdx.x % kWarp == 0 && k + c < int(T.classes)) P.product_terms[int64_t(tile) * T.classes + k + c] = dot;
    }
  }
  if (!P.dweight) return;
  W* out = static_cast<W*>(P.dweight) + k * T.width + d;
#pragma unroll
  for (int c = 0; c < 8; ++c, out += T.width) {
    float a = P.product_terms ? factors[c] : 1.0f;
    if constexpr (Whole) {
      Vector<W, 4> four;
#pragma unroll
      for (int e = 0; e < 4; ++e) four[e] = from_float<W>(a * sums[c][e]);
      if (k + c < int(T.classes) && d < end) *reinterpret_cast<Vector<W, 4>*>(out) = four;
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (k + c < int(T.classes) && d + e < end) out[e] = from_float<W>(a * sums[c][e]);
    }
  }
}

__device__ __forceinline__ void weight_tile(const HeadBackward& P, unsigned number, float* scratch) {
  const HeadTail& T = P.tail;
  unsigned class_tiles = unsigned(ceil_div(T.classes, kWeightClasses)), tile = number / class_tiles;
  int k0 = int(number - tile * class_tiles) * kWeightClasses;
  ColumnTile at = columns_of(T, P.weight_tiles, int(tile), kWeightColumns);
  int d = at.begin + 4 * int(threadIdx.x % kWarp);
  int own = int(threadIdx.x) / kWarp * 8;

  // Without Z ds is dy, sums are G, and A comes in at the end
  constexpr int kStagers = kHeadThreads / kWeightClasses;  // threads that share a class's images
  int klass = threadIdx.x % kWeightClasses, stager = threadIdx.x / kWeightClasses;
  int k = k0 + klass;
  bool inside = k < int(T.classes);
  float a = inside && scales_dy(P) ? stage_weight(T, at.stage, k) : 1.0f, *factors = scratch + kFactorsAt;
  if (stager == 0) factors[klass] = a;
  float sums[8][4] = {};
#pragma unroll 1
  for (int b0 = 0; b0 < int(T.batch); b0 += kBatchChunk) {
    int chunk = min(kBatchChunk, int(T.batch) - b0);
    float ds[kBatchChunk / kStagers];
    int count = inside ? (chunk - stager + kStagers - 1) / kStagers : 0;
    if (P.product_terms)
      strided_elements(ds, P.dy, (b0 + stager) * T.classes + k, kStagers * T.classes, count);
    else
      score_gradients(ds, P, b0 + stager, kStagers, count, at.stage, k, a);
#pragma unroll
    for (int r = 0; r < kBatchChunk / kStagers; ++r) scratch[klass * kBatchPitch + r * kStagers + stager] = ds[r];
    __syncthreads();
    if (T.vectors)
      add_images<true>(sums, T, b0, chunk, d, at.end, scratch + own * kBatchPitch);
    else
      add_images<false>(sums, T, b0, chunk, d, at.end, scratch + own * kBatchPitch);
    __syncthreads();
    int done = b0 / kBatchChunk + 1;
    bool is_last = b0 + kBatchChunk >= int(T.batch);
    if (has_totals(T) && (done % kChunksToTotal == 0 || is_last)) add_to_totals(sums, scratch + kTotalsAt, done == kChunksToTotal, is_last);
  }
  with_weight(T, [&](auto w, auto whole) { finish_weight<decltype(w), decltype(whole)::value>(sums, P, tile, k0 + own, d, at.end, factors + own); });
}

__device__ __host__ __forceinline__ int64_t pooled_tiles(const HeadBackward& P) {
  return P.dpooled ? ceil_div(P.tail.batch, kProductImages) * P.pooled_tiles[P.tail.count] : 0;
}
__device__ __host__ __forceinline__ int64_t weight_tiles(const HeadBackward& P) {
  return P.dweight || P.product_terms ? ceil_div(P.tail.classes, kWeightClasses) * P.weight_tiles[P.tail.count] : 0;
}

}  // namespace interflow
