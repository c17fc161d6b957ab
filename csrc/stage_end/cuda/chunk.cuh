// Chunks of 16 bytes in words of Packed<T>: what the stage end does to one, and how one is read and written.
#pragma once
#include "common/cuda/map_sums.cuh"
#include "stage_end/cuda/kernels.h"

namespace interflow {

constexpr int kEndAtOnce = int(end_planning::kEndAtOnce);
constexpr int kChunkWords = 4;

template <class T>
constexpr int kChunk = end_vector(sizeof(T) == 4 ? DType::F32 : DType::BF16);

using Chunk = uint32_t[kChunkWords];

// --- elements of a chunk ------------------------------------------------------------------------------------------------------
// All bits of those elements of word q that are below `count`.
template <class T>
__device__ __forceinline__ uint32_t below(int q, int count) {
  if constexpr (kPer<T> == 2)
    return (2 * q < count ? 0xffffu : 0) | (2 * q + 1 < count ? 0xffff0000u : 0);
  else
    return q < count ? ~0u : 0;
}

// A number on T's grid in all elements of a word.
template <class T>
__device__ __forceinline__ uint32_t spread(float x) {
  float each[kPer<T>];
#pragma unroll
  for (int k = 0; k < kPer<T>; ++k) each[k] = x;
  return Packed<T>::pack(each);
}

// The sum of a chunk's elements, as a tree; those that are not there are 0.
template <class T>
__device__ __forceinline__ float sum_of_chunk(const Chunk& x) {
  float each[kChunk<T>];
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) each[i] = Packed<T>::get(x[i / kPer<T>], i % kPer<T>);
  return sum_of_pairs(each);
}

// --- forward ------------------------------------------------------------------------------------------------------------------
// x: u, becomes v. shift: on u's grid, of each element; residual: none where it is not there.
template <class T>
__device__ __forceinline__ void end_chunk(Chunk& x, const Chunk& shift, const Chunk& residual, bool has_residual, bool relu) {
#pragma unroll
  for (int q = 0; q < kChunkWords; ++q) {
    x[q] = Packed<T>::add(x[q], shift[q]);
    if (has_residual) x[q] = Packed<T>::add(x[q], residual[q]);
    if (relu) x[q] = rectify_signed<T>(x[q]);
  }
}

// --- backward -----------------------------------------------------------------------------------------------------------------
// d: dv + gp where v passes, else 0; gp: dp / (H W) of each element, or -0. du: d, rounded.
template <class T>
__device__ __forceinline__ void end_gradient(float (&d)[kChunk<T>], Chunk& du, const Chunk& dv, const float (&gp)[kChunk<T>], const Chunk& v, bool relu) {
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) {
    d[i] = Packed<T>::get(dv[i / kPer<T>], i % kPer<T>) + gp[i];
    if (relu && Packed<T>::get(v[i / kPer<T>], i % kPer<T>) <= 0.0f) d[i] = 0.0f;
  }
#pragma unroll
  for (int q = 0; q < kChunkWords; ++q) {
    float of_word[kPer<T>];
#pragma unroll
    for (int k = 0; k < kPer<T>; ++k) of_word[k] = d[q * kPer<T> + k];
    du[q] = Packed<T>::pack(of_word);
  }
}

// What stands for a gradient of v that is missing: -0 everywhere, which changes no number.
template <class T>
__device__ __forceinline__ void set_minus_zero(Chunk& x) {
#pragma unroll
  for (int q = 0; q < kChunkWords; ++q) x[q] = Packed<T>::kTops;
}

}  // namespace interflow
