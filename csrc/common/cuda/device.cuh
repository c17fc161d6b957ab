// What every kernel file starts from: the CUDA language and the functions behind which inline PTX hides. Nothing about one operator.
//
// The kernel files compile twice: by nvcc, and by g++ for the host emulation under tests/, which has a twin of ptx.cuh and of the
// language. So that both see the same source, kernels keep to this:
//   - __global__ void kernel(const __grid_constant__ Params P), one struct, launched by launch() of launch.h;
//   - one dimension of blocks and threads; shared memory from shared_memory() only; no static or extern __shared__;
//   - memory that blocks of one launch exchange: written plainly or by store_*, published by a *_release or *_acq_rel atomic after
//     __syncthreads(), awaited by load_acquire, then read through load_shared_result();
//   - what copy_async() brings into shared memory: awaited by wait_for_copies() of the thread that asked for it, then a barrier before
//     others read it; and a barrier between the last reading of what lay there before and copy_async();
//   - of the language: __syncthreads, __syncwarp, __shfl_sync, __shfl_xor_sync, __shfl_down_sync with full masks, and plain C++.
#pragma once

#if INTERFLOW_EMULATION
#include "emulation.h"
#else
#include "common/cuda/ptx.cuh"
#endif

#include <cstring>
#include <type_traits>

#include "../dtype.h"

namespace interflow {

constexpr int kWarp = 32;

// N elements of T that travel together; N * sizeof(T) is 2, 4, 8 or 16 bytes where it is loaded or stored whole.
template <class T, int N>
struct alignas(N * sizeof(T) <= 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
  __device__ __forceinline__ T& operator[](int i) { return at[i]; }
  __device__ __forceinline__ const T& operator[](int i) const { return at[i]; }
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }

// Element i of an array of T in words, the first in the low half of the first.
template <class T>
__device__ __forceinline__ float word_element(const uint32_t* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    uint32_t word = words[i / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>)  // the upper half of a float
      return __uint_as_float(i % 2 ? word & 0xffff0000u : word << 16);
    else
      return __half2float(__ushort_as_half(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu)));
  }
}

// N elements of T as the words they come in from memory: taken apart only where they are used, since the
// compiler otherwise takes apart, and so waits for, the first of several loads before it issues the last.
template <class T, int N>
struct alignas(N * sizeof(T) <= 16 ? N * sizeof(T) : 16) RawVector {
  static_assert(N * sizeof(T) % 4 == 0);
  uint32_t words[N * sizeof(T) / 4];

  __device__ __forceinline__ float element(int i) const { return word_element<T>(words, i); }
  // In order, from element 0 on: the second of a word leaves the first.
  __device__ __forceinline__ void set(int i, T x) {
    if constexpr (sizeof(T) == 4) {
      memcpy(&words[i], &x, 4);
    } else {
      uint16_t bits;
      memcpy(&bits, &x, 2);
      words[i / 2] = i % 2 ? words[i / 2] | uint32_t(bits) << 16 : uint32_t(bits);
    }
  }
};

// get(kFirst, v) + ... of kCount numbers as a tree of pairs, V sums side by side. A chain of equal numbers would round each time the same way.
template <int kFirst, int kCount, int V, class Get>
__device__ __forceinline__ void add_pairs(float (&sums)[V], Get get) {
  if constexpr (kCount == 1) {
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = get(kFirst, v);
  } else {
    float right[V];
    add_pairs<kFirst, kCount / 2>(sums, get);
    add_pairs<kFirst + kCount / 2, kCount / 2>(right, get);
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] += right[v];
  }
}

// The same of an array.
template <int N>
__device__ __forceinline__ float sum_of_pairs(const float (&x)[N]) {
  float sum[1];
  add_pairs<0, N>(sum, [&](int i, int) { return x[i]; });
  return sum[0];
}

// A number that is not a template parameter: element i of an array of that dtype.
__device__ __forceinline__ float load_as_float(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::BF16: return to_float(static_cast<const __nv_bfloat16*>(data)[i]);
    case DType::F16: return to_float(static_cast<const __half*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

__device__ __forceinline__ void store_float(void* data, DType dtype, int64_t i, float x) {
  switch (dtype) {
    case DType::BF16: static_cast<__nv_bfloat16*>(data)[i] = from_float<__nv_bfloat16>(x); break;
    case DType::F16: static_cast<__half*>(data)[i] = from_float<__half>(x); break;
    default: static_cast<float*>(data)[i] = x;
  }
}

}  // namespace interflow
