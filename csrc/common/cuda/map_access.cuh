// How kernels on maps reach memory: whole pieces in 16-byte accesses, or narrower ones with a count; and which unit a block does.
#pragma once
#include "common/cuda/packed.cuh"
#include "common/cuda/map_plan.h"

namespace interflow {

__device__ __forceinline__ uint32_t divide(uint32_t n, const Divider& by) { return (uint32_t((uint64_t(n) * by.multiplier) >> 32) + n) >> by.shift; }

__device__ __forceinline__ int64_t pixels_of(const MapShape& s) { return s.height * s.width; }

// Unit by unit: slabs of the same positions follow each other.
struct MapUnit {
  uint32_t group, part, slab;
  __device__ __forceinline__ MapUnit(uint32_t unit, const MapPlan& plan) {
    uint32_t rest = divide(unit, plan.by_slabs);
    slab = unit - rest * uint32_t(plan.slabs);
    group = divide(rest, plan.by_parts);
    part = rest - group * uint32_t(plan.parts);
  }
};

// Rows that are read by parts of a sector: through L1, unlike load_stream.
template <class Chunk>
__device__ __forceinline__ Chunk load_cached(const void* p) {
#if INTERFLOW_EMULATION
  return load_stream<Chunk>(p, 0);
#else
  return *static_cast<const Chunk*>(p);
#endif
}

// --- N elements as words -----------------------------------------------------------------------------------------------------
template <int W>
__device__ __forceinline__ void load_whole(uint32_t (&words)[W], const void* p, uint64_t policy) {
  constexpr int kEach = W % 4 == 0 ? 4 : W;
#pragma unroll
  for (int i = 0; i < W; i += kEach) {
    auto chunk = load_stream<Vector<uint32_t, kEach>>(static_cast<const uint32_t*>(p) + i, policy);
#pragma unroll
    for (int k = 0; k < kEach; ++k) words[i + k] = chunk[k];
  }
}

// 16 bytes where `inside`, else zeros, without a branch: see load_stream_if.
__device__ __forceinline__ void load_whole_if(uint32_t (&words)[4], bool inside, const void* p, uint64_t policy) {
  auto chunk = load_stream_if<16>(inside, p, policy);
#pragma unroll
  for (int k = 0; k < 4; ++k) words[k] = chunk.at[k];
}

// What the next kernel reads, and so without a policy: m, du.
template <int W>
__device__ __forceinline__ void store_whole(void* p, const uint32_t (&words)[W]) {
  constexpr int kEach = W % 4 == 0 ? 4 : W;
#pragma unroll
  for (int i = 0; i < W; i += kEach) {
    Vector<uint32_t, kEach> chunk;
#pragma unroll
    for (int k = 0; k < kEach; ++k) chunk[k] = words[i + k];
    if constexpr (kEach == 4)
      store_chunk(static_cast<uint32_t*>(p) + i, chunk);
    else
      *reinterpret_cast<Vector<uint32_t, kEach>*>(static_cast<uint32_t*>(p) + i) = chunk;
  }
}

// The first `count` elements, `access` bytes at a time (a divisor of what count takes), zeros behind. Single elements lie `stride` apart.
template <class T, int W, bool kShared = false>
__device__ __forceinline__ void load_few(uint32_t (&words)[W], const T* p, int count, int access, int64_t stride = 1) {
  constexpr int kPer = 4 / int(sizeof(T));
#pragma unroll
  for (int i = 0; i < W; ++i) words[i] = 0;
  auto read = [](auto example, const T* from) {
    if constexpr (kShared)
      return *reinterpret_cast<const decltype(example)*>(from);
    else
      return load_cached<decltype(example)>(from);
  };
  auto chunks = [&](auto example) {
    using Chunk = decltype(example);
    constexpr int kEach = int(sizeof(Chunk)) / 4;
    if constexpr (W % kEach == 0) {
#pragma unroll
      for (int i = 0; i < W; i += kEach)
        if (i * kPer < count) {
          Chunk chunk = read(Chunk{}, p + i * kPer);
#pragma unroll
          for (int k = 0; k < kEach; ++k) words[i + k] = chunk[k];
        }
    }
  };
  if (access == 16)
    chunks(Vector<uint32_t, 4>{});
  else if (access == 8)
    chunks(Vector<uint32_t, 2>{});
  else if (access == 4 && sizeof(T) == 2)
    chunks(Vector<uint32_t, 1>{});
  else
#pragma unroll
    for (int i = 0; i < W * kPer; ++i)
      if (i < count) {
        if constexpr (kPer == 2)
          words[i / 2] |= uint32_t(read(uint16_t{}, p + i * stride)) << (16 * (i % 2));
        else
          words[i] = read(uint32_t{}, p + i * stride);
      }
}

template <class T, int W>
__device__ __forceinline__ void store_few(T* p, const uint32_t (&words)[W], int count, int access) {
  constexpr int kPer = 4 / int(sizeof(T));
  auto chunks = [&](auto example) {
    using Chunk = decltype(example);
    constexpr int kEach = int(sizeof(Chunk)) / 4;
    if constexpr (W % kEach == 0) {
#pragma unroll
      for (int i = 0; i < W; i += kEach)
        if (i * kPer < count) {
          Chunk chunk;
#pragma unroll
          for (int k = 0; k < kEach; ++k) chunk[k] = words[i + k];
          *reinterpret_cast<Chunk*>(p + i * kPer) = chunk;
        }
    }
  };
  if (access == 16 && W % 4 == 0)
    chunks(Vector<uint32_t, 4>{});
  else if (access >= 8)
    chunks(Vector<uint32_t, 2>{});
  else if (access == 4)
    chunks(Vector<uint32_t, 1>{});
  else if constexpr (kPer == 2)
#pragma unroll
    for (int i = 0; i < W * kPer; ++i)
      if (i < count) *reinterpret_cast<uint16_t*>(p + i) = uint16_t(words[i / 2] >> (16 * (i % 2)));
}

template <int N>
__device__ __forceinline__ void store_few_bytes(uint8_t* p, const Vector<uint8_t, N>& bytes, int count, uint64_t policy) {
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) store_stream(p + i, bytes[i], policy);
}

template <int N>
__device__ __forceinline__ Vector<uint8_t, N> load_few_bytes(const uint8_t* p, int count) {
  Vector<uint8_t, N> bytes{};
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) bytes[i] = p[i];
  return bytes;
}

// --- parameters by channel -----------------------------------------------------------------------------------------------------
// Numbers of the first `count` of N channels from `first` on, zeros behind; wide: they follow each other, aligned to 16 bytes (8, where they take
// no more). All loads are issued before the first is awaited.
template <class T, int N>
__device__ __forceinline__ void load_channels_of(float (&x)[N], const T* p, int64_t stride, int count, bool wide) {
  if (wide) {
    constexpr int kEach = N * int(sizeof(T)) < 16 ? N : 16 / int(sizeof(T));
    Vector<T, kEach> raw[N / kEach];
#pragma unroll
    for (int i = 0; i < N / kEach; ++i) raw[i] = load_cached<Vector<T, kEach>>(p + i * kEach);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(raw[i / kEach][i % kEach]);
    return;
  }
  T raw[N];
#pragma unroll
  for (int i = 0; i < N; ++i) raw[i] = p[(i < count ? i : 0) * stride];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = i < count ? to_float(raw[i]) : 0.0f;
}

// The same of an array whose dtype is not known before.
template <int N>
__device__ __forceinline__ void load_channels(float (&x)[N], const void* data, DType dtype, int64_t first, int64_t stride, int count, bool wide) {
  auto load = [&](auto* p) { load_channels_of(x, p + first * stride, stride, count, wide); };
  switch (dtype) {
    case DType::BF16: load(static_cast<const __nv_bfloat16*>(data)); break;
    case DType::F16: load(static_cast<const __half*>(data)); break;
    default: load(static_cast<const float*>(data));
  }
}

// shift on u's grid; -0, which changes no number, where there is none.
template <class T, int V, class Params>
__device__ __forceinline__ void load_shift(uint32_t (&words)[V / kPer<T>], const Params& P, int64_t first, int count) {
  float x[V];
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = -0.0f;
  if (P.shift) load_channels(x, P.shift, P.shift_dtype, first, P.shift_stride, count, P.shift_wide);
#pragma unroll
  for (int i = 0; i < V / kPer<T>; ++i) {
    float of_word[kPer<T>];
#pragma unroll
    for (int k = 0; k < kPer<T>; ++k) of_word[k] = x[i * kPer<T> + k];
    words[i] = Packed<T>::pack(of_word);
  }
}

}  // namespace interflow
