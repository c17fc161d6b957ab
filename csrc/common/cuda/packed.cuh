// Arithmetic on 32-bit words of elements: two of a 16-bit type, or one float. Nothing about one operator.
//
// Packed<T> works on all elements of a word at once. Its maximum makes every NaN the one NaN 0x7fff (0x7fffffff), so that what
// rectify() returns is, read as integers, in the order of the numbers with NaN above infinity: integer additions then compare.
#pragma once
#include <cstring>
#include <type_traits>

#include "common/cuda/device.cuh"

namespace interflow {

// --- bytes ---------------------------------------------------------------------------------------------------------------
// Each hexadecimal digit of `pick`, the lowest first, names a byte of the result: 0-3 of a, 4-7 of b; 8 more: its sign, eight times.
template <uint32_t pick>
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b) {
#if INTERFLOW_EMULATION
  uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t digit = pick >> (4 * i) & 15, byte = uint32_t(both >> (8 * (digit & 7)) & 255);
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
#else
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "n"(pick));
  return result;
#endif
}

template <class To, class From>
__device__ __forceinline__ To same_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// --- two elements of a 16-bit type --------------------------------------------------------------------------------------------
template <class T>
struct Packed {
  static_assert(sizeof(T) == 2);
  static constexpr int kPer = 2;
  static constexpr uint32_t kOnes = 0x00010001, kTops = 0x80008000;  // the lowest and the highest bit of each element
  static constexpr uint32_t kInfinity = std::is_same_v<T, __half> ? 0x7c007c00 : 0x7f807f80;

  using Pair = Vector<T, 2>;

#if INTERFLOW_EMULATION
  static bool is_nan(float x) { return x != x; }
  template <class F>
  static uint32_t each(uint32_t a, uint32_t b, F f) {
    Pair x = same_bits<Pair>(a), y = same_bits<Pair>(b), z;
    for (int i = 0; i < 2; ++i) z[i] = from_float<T>(f(to_float(x[i]), to_float(y[i])));
    return same_bits<uint32_t>(z);
  }
  static uint32_t add(uint32_t a, uint32_t b) {
    return each(a, b, [](float x, float y) { return x + y; });
  }
  static uint32_t maximum(uint32_t a, uint32_t b) {
    uint32_t m = 0;
    for (int i = 0; i < 2; ++i) {
      uint16_t x = uint16_t(a >> (16 * i)), y = uint16_t(b >> (16 * i)), infinity = uint16_t(kInfinity);
      bool nan = (x & 0x7fff) > infinity || (y & 0x7fff) > infinity;
      auto order = [](uint16_t bits) { return bits & 0x8000 ? -1 - int(bits & 0x7fff) : int(bits); };  // -0 below +0
      m |= uint32_t(nan ? 0x7fff : order(x) < order(y) ? y : x) << (16 * i);
    }
    return m;
  }
  static uint32_t nan_to_infinity(uint32_t a) {
    for (int i = 0; i < 2; ++i)
      if ((a >> (16 * i) & 0x7fff) > (kInfinity & 0xffff)) a = (a & ~(0xffffu << (16 * i))) | (kInfinity & (0xffffu << (16 * i)));
    return a;
  }
#else
  using Native = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  // Rounded once, to nearest even, as a sum in fp32 rounded to T is (24 >= 2 * 11 + 2 bits).
  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return same_bits<uint32_t>(__hadd2(same_bits<Native>(a), same_bits<Native>(b))); }
  // The larger; +0 above -0; NaN (0x7fff) where either is NaN.
  static __device__ __forceinline__ uint32_t maximum(uint32_t a, uint32_t b) {
    return same_bits<uint32_t>(__hmax2_nan(same_bits<Native>(a), same_bits<Native>(b)));
  }
  // For elements that are not negative.
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t a) {
    return same_bits<uint32_t>(__hmin2(same_bits<Native>(a), same_bits<Native>(uint32_t(kInfinity))));
  }
#endif

  static __device__ __forceinline__ float get(uint32_t a, int i) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return same_bits<float>(i ? a & 0xffff0000u : a << 16);
    else
      return to_float(same_bits<Pair>(a)[i]);
  }
  // Rounds to nearest even.
  static __device__ __forceinline__ uint32_t pack(const float (&x)[2]) {
#if INTERFLOW_EMULATION
    return same_bits<uint32_t>(Pair{from_float<T>(x[0]), from_float<T>(x[1])});
#else
    if constexpr (std::is_same_v<T, __half>)
      return same_bits<uint32_t>(__floats2half2_rn(x[0], x[1]));
    else
      return same_bits<uint32_t>(__floats2bfloat162_rn(x[0], x[1]));
#endif
  }
  // All bits of each element: its highest bit.
  static __device__ __forceinline__ uint32_t spread_top(uint32_t a) { return permute_bytes<0xbb99>(a, 0); }
};

// --- one float ----------------------------------------------------------------------------------------------------------------
template <>
struct Packed<float> {
  static constexpr int kPer = 1;
  static constexpr uint32_t kOnes = 1, kTops = 0x80000000, kInfinity = 0x7f800000;

  static __device__ __forceinline__ uint32_t add(uint32_t a, uint32_t b) { return same_bits<uint32_t>(same_bits<float>(a) + same_bits<float>(b)); }
  static __device__ __forceinline__ uint32_t maximum(uint32_t a, uint32_t b) {
#if INTERFLOW_EMULATION
    if ((a & 0x7fffffff) > kInfinity || (b & 0x7fffffff) > kInfinity) return 0x7fffffff;
    auto order = [](uint32_t bits) { return bits & kTops ? -1 - int64_t(bits & 0x7fffffff) : int64_t(bits); };
    return order(a) < order(b) ? b : a;
#else
    float m;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(same_bits<float>(a)), "f"(same_bits<float>(b)));
    return same_bits<uint32_t>(m);
#endif
  }
  static __device__ __forceinline__ uint32_t nan_to_infinity(uint32_t a) { return a > kInfinity ? kInfinity : a; }
  static __device__ __forceinline__ float get(uint32_t a, int) { return same_bits<float>(a); }
  static __device__ __forceinline__ uint32_t pack(const float (&x)[1]) { return same_bits<uint32_t>(x[0]); }
  static __device__ __forceinline__ uint32_t spread_top(uint32_t a) { return uint32_t(int32_t(a) >> 31); }
};

template <class T>
constexpr int kPer = Packed<T>::kPer;

// --- elements that rectify() returned: their highest bit is free -----------------------------------------------------------------
// max(x, +0); NaN stays NaN, -0 becomes +0.
template <class T>
__device__ __forceinline__ uint32_t rectify(uint32_t x) { return Packed<T>::maximum(x, 0); }

// max(x, +0); NaN stays NaN and -0 stays -0.
template <class T>
__device__ __forceinline__ uint32_t rectify_signed(uint32_t x) {
  using P = Packed<T>;
  uint32_t sign_of_zero = x & ~((x & ~P::kTops) + (P::kTops - P::kOnes)) & P::kTops;
  return rectify<T>(x) | sign_of_zero;
}

// The highest bit of each element: a > b (NaN above all). The other bits mean nothing. No borrow leaves an element.
template <class T>
__device__ __forceinline__ uint32_t above(uint32_t a, uint32_t b) { return a + (Packed<T>::kTops - Packed<T>::kOnes) - b; }

// Likewise: a is not 0.
template <class T>
__device__ __forceinline__ uint32_t not_zero(uint32_t a) { return a + (Packed<T>::kTops - Packed<T>::kOnes); }

// --- a number ---------------------------------------------------------------------------------------------------------------
// x / by, rounded once (Markstein's correction, given 1 / by rounded): the division that the compiler calls costs registers.
__device__ __forceinline__ float divided(float x, float by, float reciprocal) {
  float quotient = x * reciprocal, error = fmaf(-quotient, by, x);
  return error - error == 0.0f ? fmaf(error, reciprocal, quotient) : quotient;  // infinities and NaN stay
}

}  // namespace interflow
