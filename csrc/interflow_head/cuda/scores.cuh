// Backward, first kernel: Z again, where a gradient needs it. Gates leave ds and the terms of dM and dc; linear modes the terms of dA.
#pragma once
#include "interflow_head/cuda/gradient.cuh"

namespace interflow {

constexpr int kNarrowTiles = kNarrowClasses / 8;
using ScoreShared = TailShared<kNarrowTiles>;
constexpr int kOutputs = ScoreShared::kOutputs, kStage = kWarps * kOutputs;

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
  ScoreShared shared(scratch, n, true);
  Tile tile{first, klass0, int(min(int64_t(kTileImages), T.batch - first)), int(min(int64_t(kNarrowClasses), T.classes - klass0))};
  multiply<W, kNarrowTiles, true>(T, tile, shared, false);
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
    int terms = n * n + n, adder = threadIdx.x / kAdders;
    for (int first_term = 0; first_term < terms; first_term += kHeadThreads / kAdders) {
      int t = min(first_term + adder, terms - 1), i = t < n * n ? t / n : t - n * n, j = t < n * n ? t % n : -1;
      const float *ds = shared.z + i * kStage + 2 * kOutputs, *z = shared.z + j * kStage;
      float sum = sum_by_eight(kOutputs, [&](unsigned p) {
        p ^= adder % (kWarp / kAdders) * kAdders;  // the terms of a warp on different banks
        return j < 0 ? ds[p] : ds[p] * z[p];
      });
      if (threadIdx.x % kAdders == 0 && first_term + adder < terms) P.gate_terms[int64_t(number) * terms + t] = sum;
    }
  } else {
    for (int t = threadIdx.x; t < n * tile.classes; t += kHeadThreads) {
      int i = t / tile.classes, column = t - i * tile.classes;
      float terms[kTileImages];
#pragma unroll
      for (int row = 0; row < kTileImages; ++row) terms[row] = shared.z[i * kStage + row * kNarrowClasses + column];
      P.score_terms[(int64_t(group) * n + i) * T.classes + klass0 + column] = sum_of_pairs(terms);
    }
  }
}

}  // namespace interflow
