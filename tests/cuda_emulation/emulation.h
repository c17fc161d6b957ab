// CUDA on the host: the language that kernels use, and a twin of every function of csrc/common/cuda/ptx.cuh and csrc/common/cuda/launch.h.
//
// A kernel file is compiled by g++ -x c++ with this header in place of ptx.cuh. Every CUDA thread is a fiber; one OS thread runs them all in an
// order drawn from a seed. The compiler's ThreadSanitizer calls announce every plain access (hooks.cpp), the twins below announce the others, and
// memory.cpp decides for each whether something ordered it with what other threads did, whether it lies in a tensor, is aligned, was written.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <driver_types.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "control.h"

// --- the language ------------------------------------------------------------------------------------------------------------
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define threadIdx (::uint3{::interflow::emulation::thread_index(), 0, 0})
#define blockIdx (::uint3{::interflow::emulation::block_index(), 0, 0})
#define blockDim (::dim3(::interflow::emulation::threads()))
#define gridDim (::dim3(::interflow::emulation::blocks()))

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { ::interflow::emulation::barrier(0, file, line); }
inline int __syncthreads_count(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return ::interflow::emulation::barrier(yes != 0, file, line);
}
inline int __syncthreads_or(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return __syncthreads_count(yes, file, line) != 0; }
inline int __syncthreads_and(int yes, const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return __syncthreads_count(!yes, file, line) == 0; }
inline void __syncwarp(unsigned mask = ~0u) { ::interflow::emulation::sync_warp(mask); }
inline void __threadfence() { ::interflow::emulation::fence(); }
inline void __nanosleep(unsigned) { ::interflow::emulation::wait_a_little(); }

// Of 1 to 16 bytes. `width` divides the warp into equal parts, as in CUDA.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  int mine = int(::interflow::emulation::thread_index() % 32);
  ::interflow::emulation::shuffle(mask, &value, sizeof value, (mine & -width) | (lane & (width - 1)));
  return value;
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32) {
  int mine = int(::interflow::emulation::thread_index() % 32), other = mine ^ flip;
  ::interflow::emulation::shuffle(mask, &value, sizeof value, (other & -width) <= (mine & -width) ? other : mine);
  return value;
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int mine = int(::interflow::emulation::thread_index() % 32);
  ::interflow::emulation::shuffle(mask, &value, sizeof value, (mine & (width - 1)) + int(by) < width ? mine + int(by) : mine);
  return value;
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  int mine = int(::interflow::emulation::thread_index() % 32);
  ::interflow::emulation::shuffle(mask, &value, sizeof value, (mine & (width - 1)) >= int(by) ? mine - int(by) : mine);
  return value;
}
inline unsigned __ballot_sync(unsigned mask, int yes) { return ::interflow::emulation::vote(mask, yes != 0); }
inline int __any_sync(unsigned mask, int yes) { return ::interflow::emulation::vote(mask, yes != 0) != 0; }
inline int __all_sync(unsigned mask, int yes) { return ::interflow::emulation::vote(mask, yes == 0) == 0; }

inline unsigned atomicAdd(unsigned* p, unsigned add) { return ::interflow::emulation::atomic_add(p, add, false, false); }
inline unsigned atomicExch(unsigned* p, unsigned value) { return ::interflow::emulation::atomic_exchange(p, value, false, false); }
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned value) {
  return ::interflow::emulation::atomic_compare_exchange(p, expected, value, false, false);
}

template <class T>
inline T __ldg(const T* p) {
  T value;
  ::interflow::emulation::load(&value, p, sizeof(T), ::interflow::emulation::Cached::Stream);
  return value;
}
template <class T>
inline T __ldcg(const T* p) {
  T value;
  ::interflow::emulation::load(&value, p, sizeof(T), ::interflow::emulation::Cached::Coherent);
  return value;
}

// --- arithmetic ----------------------------------------------------------------------------------------------------------------
using std::max;
using std::min;
inline int64_t min(int64_t a, int b) { return a < b ? a : b; }
inline int64_t min(int a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int b) { return a > b ? a : b; }
inline int64_t max(int a, int64_t b) { return a > b ? a : b; }
inline unsigned min(unsigned a, int b) { return a < unsigned(b) ? a : unsigned(b); }
inline unsigned min(int a, unsigned b) { return unsigned(a) < b ? unsigned(a) : b; }
inline unsigned max(unsigned a, int b) { return a > unsigned(b) ? a : unsigned(b); }
inline unsigned max(int a, unsigned b) { return unsigned(a) > b ? unsigned(a) : b; }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = uint64_t(b) << 32 | a;
  unsigned y = 0;
  for (int i = 0; i < 4; ++i) {
    unsigned byte = unsigned(bytes >> 8 * (selector >> 4 * i & 7)) & 0xff;
    if (selector >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;
    y |= byte << 8 * i;
  }
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __int_as_float(int x) { return __uint_as_float(unsigned(x)); }
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
// The headers have these for the device alone. In double: products are exact, and so is almost every sum before the one rounding.
inline __nv_bfloat16 __hfma(__nv_bfloat16 a, __nv_bfloat16 b, __nv_bfloat16 c) {
  return __double2bfloat16(double(__bfloat162float(a)) * double(__bfloat162float(b)) + double(__bfloat162float(c)));
}
inline __half __hfma(__half a, __half b, __half c) { return __double2half(double(__half2float(a)) * double(__half2float(b)) + double(__half2float(c))); }
inline __nv_bfloat162 __hfma2(__nv_bfloat162 a, __nv_bfloat162 b, __nv_bfloat162 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }

namespace interflow {

// --- ptx.cuh ---------------------------------------------------------------------------------------------------------------------
inline int from_here(int x) { return x; }
inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline uint64_t cache_policy(bool stream) { return stream; }

template <class T>
inline T load_stream(const void* p, uint64_t) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  emulation::load(&value, p, sizeof(T), emulation::Cached::Stream);
  return value;
}

template <class T>
inline void store_stream(void* p, const T& value, uint64_t) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulation::store(p, &value, sizeof(T));
}

template <class T>
inline void store_chunk(void* p, const T& value) {
  static_assert(sizeof(T) == 16);
  emulation::store(p, &value, 16);
}

template <class T>
inline T load_shared_result(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  emulation::load(&value, p, sizeof(T), emulation::Cached::Coherent);
  return value;
}

template <int kBytes>
struct Words {
  uint32_t at[(kBytes + 3) / 4];
};

template <int kBytes>
inline Words<kBytes> load_stream_if(bool inside, const void* p, uint64_t) {
  Words<kBytes> x{};
  if (inside) emulation::load(&x, p, kBytes, emulation::Cached::Stream);
  return x;
}

template <int kBytes>
inline Words<kBytes> load_if(bool inside, const void* p) {
  return load_stream_if<kBytes>(inside, p, 0);
}

template <int kBytes>
inline void copy_async(void* shared, const void* p) {
  static_assert(kBytes == 4 || kBytes == 16);
  emulation::copy_async(shared, p, kBytes);
}
inline void wait_for_copies() { emulation::wait_for_copies(); }

// The address must be one that may be read.
inline void prefetch_l2(const void* p) {
  char byte;
  emulation::load(&byte, p, 1, emulation::Cached::Coherent);
}

inline uint32_t atomic_add_relaxed(uint32_t* p, uint32_t add) { return emulation::atomic_add(p, add, false, false); }
inline uint32_t atomic_add_release(uint32_t* p, uint32_t add) { return emulation::atomic_add(p, add, false, true); }
inline uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t add) { return emulation::atomic_add(p, add, true, true); }
inline uint32_t draw_ticket(uint32_t* p) { return emulation::atomic_add(p, 1, false, false); }
inline uint32_t load_relaxed(const uint32_t* p) { return emulation::atomic_load(p, false); }
inline uint32_t load_acquire(const uint32_t* p) { return emulation::atomic_load(p, true); }
inline void store_relaxed(uint32_t* p, uint32_t value) { emulation::atomic_store(p, value, false); }
inline void wait_a_little() { emulation::wait_a_little(); }

inline uint64_t nanoseconds() { return emulation::nanoseconds(); }
inline void give_up(const char* who, uint32_t number, const char* what, const char* expected) { emulation::give_up(who, number, what, expected); }

inline uint32_t to_tf32(float x) {
  uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000) == 0x7f800000) return bits & 0x007fe000 || !(bits & 0x007fffff) ? bits & 0xffffe000 : 0x7fffe000;  // infinities, NaN
  return (bits + 0x1000) & 0xffffe000;
}

inline void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { emulation::mma_16x8x8_tf32(c, a, b); }

// --- launch.h ----------------------------------------------------------------------------------------------------------------------
struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  cudaStream_t stream;
};

namespace emulation {
template <class Params>
struct Call {
  void (*kernel)(Params);
  const Params* params;
  // What every thread runs: its parameters are a copy on its own stack.
  __attribute__((no_sanitize("thread"))) static void invoke(const void* call) {
    auto& self = *static_cast<const Call*>(call);
    self.kernel(*self.params);
  }
};
}  // namespace emulation

// The kernel has run when it returns.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params) {
  emulation::Call<Params> call{kernel, &params};
  bool good = emulation::launch_kernel({call.invoke, &call, &params, sizeof params, shape.blocks, shape.threads, shape.shared_bytes});
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

template <class Params>
int64_t resident_blocks(void (*)(Params), int, int, cudaError_t* error) {
  *error = cudaSuccess;
  return emulation::settings.blocks;
}

}  // namespace interflow
