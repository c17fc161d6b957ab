// Functions behind which inline PTX hides: cache-hinted loads and stores, copies into shared memory, ordered atomics, matrix instructions.
// sm_80 and newer.
// tests/cuda_emulation/emulation.h has a twin of every one of them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>
#include <cstdint>
#include <cstring>

namespace interflow {

// The same number, of which nothing is computed before here: numbers that many branches derive from the thread's index
// would otherwise be computed at a kernel's start and hold registers through all of it.
__device__ __forceinline__ int from_here(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// --- shared memory: all that the launch asked for, aligned to 16 bytes -----------------------------------------------------
extern __shared__ __align__(16) unsigned char interflow_shared_bytes[];
__device__ __forceinline__ unsigned char* shared_memory() { return interflow_shared_bytes; }

// --- streams of global memory that are read or written once ------------------------------------------------------------------
// How lines stay in L2: first to leave (a stream larger than the cache), or as usual.
__device__ __forceinline__ uint64_t cache_policy(bool stream) {
  uint64_t policy;
  if (stream)
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  else
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// T of 2, 4, 8 or 16 bytes, aligned to its size; memory that nobody writes during the launch.
template <class T>
__device__ __forceinline__ T load_stream(const void* p, uint64_t policy) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  if constexpr (sizeof(T) == 16) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p), "l"(policy));
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;" : "=r"(v.x), "=r"(v.y) : "l"(p), "l"(policy));
    memcpy(&value, &v, 8);
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(v) : "l"(p), "l"(policy));
    memcpy(&value, &v, 4);
  } else {
    uint16_t v;
    asm("ld.global.nc.L1::no_allocate.L2::cache_hint.u16 %0, [%1], %2;" : "=h"(v) : "l"(p), "l"(policy));
    memcpy(&value, &v, 2);
  }
  return value;
}

// Bytes as they come from memory, fewer than 4 of them in the low end of a word.
template <int kBytes>
struct Words {
  uint32_t at[(kBytes + 3) / 4];
};

// The same where `inside`, else zeros. The predicate is part of the instruction: a branch or a select around it makes the compiler wait
// for the first loads before it issues the last.
template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_stream_if(bool inside, const void* p, uint64_t policy) {
  static_assert(kBytes == 1 || kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  Words<kBytes> x;
  if constexpr (kBytes == 16) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %6, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
        " @q ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;\n}"
        : "=&r"(x.at[0]), "=&r"(x.at[1]), "=&r"(x.at[2]), "=&r"(x.at[3])
        : "l"(p), "l"(policy), "r"(int(inside)));
  } else if constexpr (kBytes == 8) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %4, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n @q ld.global.nc.L1::no_allocate.L2::cache_hint.v2.u32 {%0, %1}, [%2], %3;\n}"
        : "=&r"(x.at[0]), "=&r"(x.at[1])
        : "l"(p), "l"(policy), "r"(int(inside)));
  } else if constexpr (kBytes == 4) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %3, 0;\n mov.b32 %0, 0;\n @q ld.global.nc.L1::no_allocate.L2::cache_hint.u32 %0, [%1], %2;\n}"
        : "=&r"(x.at[0])
        : "l"(p), "l"(policy), "r"(int(inside)));
  } else if constexpr (kBytes == 1) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %3, 0;\n mov.b32 %0, 0;\n @q ld.global.nc.L1::no_allocate.L2::cache_hint.u8 %0, [%1], %2;\n}"
        : "=&r"(x.at[0])
        : "l"(p), "l"(policy), "r"(int(inside)));
  } else {
    asm("{\n .reg .pred q;\n .reg .b16 h;\n setp.ne.b32 q, %3, 0;\n mov.b16 h, 0;\n @q ld.global.nc.L1::no_allocate.L2::cache_hint.u16 h, [%1], %2;\n cvt.u32.u16 %0, h;\n}"
        : "=&r"(x.at[0])
        : "l"(p), "l"(policy), "r"(int(inside)));
  }
  return x;
}

// The same with L2's usual policy: on sm_80 to sm_89 a policy takes two registers.
template <int kBytes>
__device__ __forceinline__ Words<kBytes> load_if(bool inside, const void* p) {
  static_assert(kBytes == 2 || kBytes == 4 || kBytes == 8 || kBytes == 16);
  Words<kBytes> x;
  if constexpr (kBytes == 16) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %5, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n mov.b32 %2, 0;\n mov.b32 %3, 0;\n"
        " @q ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
        : "=&r"(x.at[0]), "=&r"(x.at[1]), "=&r"(x.at[2]), "=&r"(x.at[3])
        : "l"(p), "r"(int(inside)));
  } else if constexpr (kBytes == 8) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %3, 0;\n mov.b32 %0, 0;\n mov.b32 %1, 0;\n @q ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
        : "=&r"(x.at[0]), "=&r"(x.at[1])
        : "l"(p), "r"(int(inside)));
  } else if constexpr (kBytes == 4) {
    asm("{\n .reg .pred q;\n setp.ne.b32 q, %2, 0;\n mov.b32 %0, 0;\n @q ld.global.nc.L1::no_allocate.u32 %0, [%1];\n}"
        : "=&r"(x.at[0])
        : "l"(p), "r"(int(inside)));
  } else {
    asm("{\n .reg .pred q;\n .reg .b16 h;\n setp.ne.b32 q, %2, 0;\n mov.b16 h, 0;\n @q ld.global.nc.L1::no_allocate.u16 h, [%1];\n cvt.u32.u16 %0, h;\n}"
        : "=&r"(x.at[0])
        : "l"(p), "r"(int(inside)));
  }
  return x;
}

// T of 1, 2, 4, 8 or 16 bytes, aligned to its size; not read again by this launch.
template <class T>
__device__ __forceinline__ void store_stream(void* p, const T& value, uint64_t policy) {
  static_assert(sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  if constexpr (sizeof(T) == 16) {
    uint4 v;
    memcpy(&v, &value, 16);
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "l"(policy) : "memory");
  } else if constexpr (sizeof(T) == 8) {
    uint2 v;
    memcpy(&v, &value, 8);
    asm volatile("st.global.L2::cache_hint.v2.u32 [%0], {%1, %2}, %3;" ::"l"(p), "r"(v.x), "r"(v.y), "l"(policy) : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t v;
    memcpy(&v, &value, 4);
    asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(p), "r"(v), "l"(policy) : "memory");
  } else if constexpr (sizeof(T) == 2) {
    uint16_t v;
    memcpy(&v, &value, 2);
    asm volatile("st.global.L2::cache_hint.u16 [%0], %1, %2;" ::"l"(p), "h"(v), "l"(policy) : "memory");
  } else {
    uint32_t v = 0;
    memcpy(&v, &value, 1);
    asm volatile("st.global.L2::cache_hint.u8 [%0], %1, %2;" ::"l"(p), "r"(v), "l"(policy) : "memory");
  }
}

// 16 bytes of global memory, aligned, as usual: in one instruction, whatever the compiler knows of p.
template <class T>
__device__ __forceinline__ void store_chunk(void* p, const T& value) {
  static_assert(sizeof(T) == 16);
  uint4 v;
  memcpy(&v, &value, 16);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// What another block of this launch wrote and published: past L1, which is not coherent. T of 4, 8 or 16 bytes.
template <class T>
__device__ __forceinline__ T load_shared_result(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  if constexpr (sizeof(T) == 16) {
    uint4 v = __ldcg(reinterpret_cast<const uint4*>(p));
    memcpy(&value, &v, 16);
  } else if constexpr (sizeof(T) == 8) {
    uint2 v = __ldcg(reinterpret_cast<const uint2*>(p));
    memcpy(&value, &v, 8);
  } else {
    uint32_t v = __ldcg(reinterpret_cast<const uint32_t*>(p));
    memcpy(&value, &v, 4);
  }
  return value;
}

// --- copies from global into shared memory that go on while the thread does something else -------------------------------------
// kBytes of memory that nobody writes during the launch, both addresses aligned to them: 16, past L1, or 4. Until the thread has waited, nobody
// may touch `shared`; after that other threads may, behind a barrier. Without a cache policy: from sm_90 on ptxas (12.9, 13.0) encodes a copy
// that has one, and whose shared address is a sum with a uniform register, with the wrong registers for both.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* p) {
  static_assert(kBytes == 4 || kBytes == 16);
  uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(p) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(p) : "memory");
}
// Waits for all copies that this thread has begun.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Asks for the line of an address to be brought into L2.
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// --- counters in global memory: each returns the value before ------------------------------------------------------------------
__device__ __forceinline__ uint32_t atomic_add_relaxed(uint32_t* p, uint32_t add) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(add) : "memory");
  return before;
}
__device__ __forceinline__ uint32_t atomic_add_release(uint32_t* p, uint32_t add) {
  uint32_t before;
  asm volatile("atom.release.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(add) : "memory");
  return before;
}
__device__ __forceinline__ uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t add) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(add) : "memory");
  return before;
}
// A ticket: adds 1, relaxed. As an increment that never wraps, which the compiler does not turn into one addition for a whole warp.
__device__ __forceinline__ uint32_t draw_ticket(uint32_t* p) {
  uint32_t before;
  asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], 0xffffffff;" : "=r"(before) : "l"(p) : "memory");
  return before;
}
__device__ __forceinline__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* p) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ __forceinline__ void store_relaxed(uint32_t* p, uint32_t value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}
// Inside a loop that waits for a counter: lets others run.
__device__ __forceinline__ void wait_a_little() { __nanosleep(20); }

// --- a wait that never ends ------------------------------------------------------------------------------------------------------
// A clock of the whole GPU, in nanoseconds; it moves once in about a microsecond.
__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}
// Traps. The driver prints "<who>:<number>: <what>: block: [..], thread: [..] Assertion `<expected>` failed.", and CUDA calls return cudaErrorAssert from then on.
__device__ __forceinline__ void give_up(const char* who, uint32_t number, const char* what, const char* expected) { __assert_fail(expected, who, number, what); }

// --- matrix instructions -----------------------------------------------------------------------------------------------------
// The TF32 number nearest to x (10 bits of mantissa, ties away from zero), as the bits of a float.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// c [16, 8] += a [16, 8] b [8, 8], TF32 in, fp32 out. With g = lane / 4, j = lane % 4 a lane holds
//   a: (row g, k j), (g + 8, j), (g, j + 4), (g + 8, j + 4)    b: (k j, column g), (j + 4, g)    c: (g, 2j), (g, 2j + 1), (g + 8, 2j), (g + 8, 2j + 1)
__device__ __forceinline__ void mma_16x8x8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace interflow
