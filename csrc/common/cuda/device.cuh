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

#include "common/dtype.h"

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
