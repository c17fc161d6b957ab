// Vectors of 32 bytes in the compilers' own vector extension: loads with conversion, fused multiply-add, reductions, stores.
// Nothing about one operator. Included once for each instruction set, inside its namespace, so that no inline function of
// one set can be linked into another: baseline (SSE2; NEON on aarch64) and avx2 (AVX2, FMA, F16C).
// No include guard: every including file compiles exactly one instruction set.
#include "common/cpu/vector_lanes.h"

namespace interflow::INTERFLOW_ISA {

// --- loads: kLanes<Acc> elements of any storage type, as Acc ---------------------------------------------------------
INTERFLOW_INLINE Vec<float> load(const float* p) { return load_bytes<Vec<float>>(p); }
INTERFLOW_INLINE Vec<double> load(const double* p) { return load_bytes<Vec<double>>(p); }
INTERFLOW_INLINE Vec<float> load(const BFloat16* p) {
  U32x8 wide = __builtin_convertvector(load_bytes<U16x8>(p), U32x8);
  return bits<Vec<float>>(wide << 16);
}
INTERFLOW_INLINE Vec<float> load(const Half* p) {
#if defined(INTERFLOW_AVX2)
  return bits<Vec<float>>(_mm256_cvtph_ps(load_bytes<__m128i>(p)));
#else
  // Exponent and mantissa moved to fp32's places, then scaled by 2^112: exact for subnormals too. Inf and NaN keep all exponent bits.
  U32x8 h = __builtin_convertvector(load_bytes<U16x8>(p), U32x8);
  U32x8 magnitude = (h & 0x7fffu) << 13;
  U32x8 special = (U32x8)less(I32x8{} + 0x0f7fffff, (I32x8)magnitude) & 0x7f800000u;
  U32x8 scaled = bits<U32x8>(bits<Vec<float>>(magnitude) * 0x1p112f);
  return bits<Vec<float>>(scaled | special | ((h & 0x8000u) << 16));
#endif
}

// --- pairs: 2 * kLanes<Acc> elements as two vectors whose order is the storage type's own (cheapest) -----------------
template <class Acc>
struct Pair {
  Vec<Acc> first, second;
};
template <class T>
INTERFLOW_INLINE auto load_pair(const T* p) {
  using Acc = decltype(load(p)[0] + 0);
  return Pair<Acc>{load(p), load(p + kLanes<Acc>)};
}
// bf16: one word holds an even and an odd element; two instructions convert sixteen.
INTERFLOW_INLINE Pair<float> load_pair(const BFloat16* p) {
  U32x8 words = load_bytes<U32x8>(p);
  return {bits<Vec<float>>(words << 16), bits<Vec<float>>(words & 0xffff0000u)};
}
// Where element j of a pair's 2 * kLanes lies when first and second are written one after the other.
template <class T>
constexpr int pair_position(int j) {
  return std::is_same_v<T, BFloat16> ? j % 2 * 8 + j / 2 : j;
}

// Elements 0, 2, 4, ... as first, 1, 3, 5, ... as second, each in order.
template <class T>
INTERFLOW_INLINE auto load_split(const T* p) {
  using Acc = decltype(load(p)[0] + 0);
  Vec<Acc> a = load(p), b = load(p + kLanes<Acc>);
#if defined(INTERFLOW_AVX2)
  if constexpr (sizeof(Acc) == 4)
    return Pair<Acc>{shuffle<0, 2, 4, 6, 8, 10, 12, 14>(a, b), shuffle<1, 3, 5, 7, 9, 11, 13, 15>(a, b)};
  else
    return Pair<Acc>{shuffle<0, 2, 4, 6>(a, b), shuffle<1, 3, 5, 7>(a, b)};
#else
  auto a0 = half(a, 0), a1 = half(a, 1), b0 = half(b, 0), b1 = half(b, 1);
  if constexpr (sizeof(Acc) == 4)
    return Pair<Acc>{join<Vec<Acc>>(shuffle<0, 2, 4, 6>(a0, a1), shuffle<0, 2, 4, 6>(b0, b1)), join<Vec<Acc>>(shuffle<1, 3, 5, 7>(a0, a1), shuffle<1, 3, 5, 7>(b0, b1))};
  else
    return Pair<Acc>{join<Vec<Acc>>(shuffle<0, 2>(a0, a1), shuffle<0, 2>(b0, b1)), join<Vec<Acc>>(shuffle<1, 3>(a0, a1), shuffle<1, 3>(b0, b1))};
#endif
}
INTERFLOW_INLINE Pair<float> load_split(const BFloat16* p) { return load_pair(p); }

// The inverse: first[0], second[0], first[1], ... as two vectors in order.
template <class Acc>
INTERFLOW_INLINE Pair<Acc> interleave(Vec<Acc> first, Vec<Acc> second) {
#if defined(INTERFLOW_AVX2)
  if constexpr (sizeof(Acc) == 4)
    return {shuffle<0, 8, 1, 9, 2, 10, 3, 11>(first, second), shuffle<4, 12, 5, 13, 6, 14, 7, 15>(first, second)};
  else
    return {shuffle<0, 4, 1, 5>(first, second), shuffle<2, 6, 3, 7>(first, second)};
#else
  auto f0 = half(first, 0), f1 = half(first, 1), s0 = half(second, 0), s1 = half(second, 1);
  if constexpr (sizeof(Acc) == 4)
    return {join<Vec<Acc>>(shuffle<0, 4, 1, 5>(f0, s0), shuffle<2, 6, 3, 7>(f0, s0)), join<Vec<Acc>>(shuffle<0, 4, 1, 5>(f1, s1), shuffle<2, 6, 3, 7>(f1, s1))};
  else
    return {join<Vec<Acc>>(shuffle<0, 2>(f0, s0), shuffle<1, 3>(f0, s0)), join<Vec<Acc>>(shuffle<0, 2>(f1, s1), shuffle<1, 3>(f1, s1))};
#endif
}

// At most kMost bytes (a power of two), in halving pieces: a call of memcpy costs more.
template <int64_t kMost>
INTERFLOW_INLINE void copy_few(void* to, const void* from, int64_t bytes) {
  if (bytes == kMost) {
    __builtin_memcpy(to, from, kMost);
    return;
  }
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
  if constexpr (kMost > 1) {
    constexpr int64_t piece = kMost / 2;
    if (bytes >= piece) {
      __builtin_memcpy(t, f, piece);
      t += piece, f += piece, bytes -= piece;
    }
    if (bytes > 0) copy_few<piece>(t, f, bytes);
  }
}

// The first n < N elements of p, zeros behind them: what a full load would give where nothing lies beyond.
template <int N, class T>
struct Padded {
  T values[N];
  INTERFLOW_INLINE Padded(const T* p, int64_t n) {
    __builtin_memset(values, 0, sizeof values);
    copy_few<int64_t(sizeof values)>(values, p, n * int64_t(sizeof(T)));
  }
};
template <class Acc, class T>
INTERFLOW_INLINE Vec<Acc> load_partial(const T* p, int64_t n) {
  return load(Padded<kLanes<Acc>, T>(p, n).values);
}

// Asks for the cache line `ahead` bytes behind p. Harmless wherever that is.
INTERFLOW_INLINE void prefetch(const void* p, int64_t ahead) { __builtin_prefetch(static_cast<const char*>(p) + ahead); }

// --- arithmetic ------------------------------------------------------------------------------------------------------
// a * b + c, fused where the instruction set has it. Explicit, so that every loop shape rounds alike (-ffp-contract=off).
INTERFLOW_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(INTERFLOW_AVX2)
  return bits<Vec<float>>(_mm256_fmadd_ps(bits<__m256>(a), bits<__m256>(b), bits<__m256>(c)));
#else
  return a * b + c;
#endif
}
INTERFLOW_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(INTERFLOW_AVX2)
  return bits<Vec<double>>(_mm256_fmadd_pd(bits<__m256d>(a), bits<__m256d>(b), bits<__m256d>(c)));
#else
  return a * b + c;
#endif
}

// fp32 lanes as fp64: lanes 0-3 and 4-7. And back, rounded. (GCC 12 makes five instructions of a conversion between vectors of unlike sizes.)
typedef float F32x4 __attribute__((vector_size(16)));
INTERFLOW_INLINE Pair<double> widened(Vec<float> v) {
  F32x4 half[2];
  __builtin_memcpy(half, &v, sizeof half);
#if defined(INTERFLOW_AVX2)
  return {bits<Vec<double>>(_mm256_cvtps_pd(bits<__m128>(half[0]))), bits<Vec<double>>(_mm256_cvtps_pd(bits<__m128>(half[1])))};
#else
  return {__builtin_convertvector(half[0], Vec<double>), __builtin_convertvector(half[1], Vec<double>)};
#endif
}
INTERFLOW_INLINE Vec<float> narrowed(Vec<double> first, Vec<double> second) {
#if defined(INTERFLOW_AVX2)
  F32x4 half[2] = {bits<F32x4>(_mm256_cvtpd_ps(bits<__m256d>(first))), bits<F32x4>(_mm256_cvtpd_ps(bits<__m256d>(second)))};
#else
  F32x4 half[2] = {__builtin_convertvector(first, F32x4), __builtin_convertvector(second, F32x4)};
#endif
  Vec<float> v;
  __builtin_memcpy(&v, half, sizeof v);
  return v;
}

// The sum of all lanes, always as a balanced tree: ((0+4)+(2+6)) + ((1+5)+(3+7)).
INTERFLOW_INLINE float reduce(Vec<float> v) {
  F32x4 low, high;
  __builtin_memcpy(&low, &v, 16);
  __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + 16, 16);
  F32x4 s = low + high;
  return (s[0] + s[2]) + (s[1] + s[3]);
}
INTERFLOW_INLINE double reduce(Vec<double> v) { return (v[0] + v[2]) + (v[1] + v[3]); }

// --- stores: round to nearest even; `exact` where v is on the storage type's grid already ------------------------------
INTERFLOW_INLINE void store(float* p, Vec<float> v) { __builtin_memcpy(p, &v, sizeof v); }
INTERFLOW_INLINE void store(double* p, Vec<double> v) { __builtin_memcpy(p, &v, sizeof v); }
INTERFLOW_INLINE void store_exact(float* p, Vec<float> v) { store(p, v); }
INTERFLOW_INLINE void store_exact(double* p, Vec<double> v) { store(p, v); }
INTERFLOW_INLINE void store_exact(BFloat16* p, Vec<float> v) {
  U16x8 narrow = __builtin_convertvector(bits<U32x8>(v) >> 16, U16x8);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
INTERFLOW_INLINE void store_exact(Half* p, Vec<float> v) {
#if defined(INTERFLOW_AVX2)
  __m128i narrow = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  // The inverse of load: scaled by 2^-112 the exponent is fp16's, in fp32's places; inf and NaN get all exponent bits
  U32x8 word = bits<U32x8>(v), magnitude = word & 0x7fffffffu;
  U32x8 scaled = bits<U32x8>(bits<Vec<float>>(magnitude) * 0x1p-112f) >> 13;
  U32x8 special = (U32x8)less(I32x8{} + 0x7f7fffff, (I32x8)magnitude), nan = (U32x8)less(I32x8{} + 0x7f800000, (I32x8)magnitude);
  U32x8 h = (special & (0x7c00u | (nan & 0x200u))) | (~special & scaled) | ((word >> 16) & 0x8000u);
  U16x8 narrow = __builtin_convertvector(h, U16x8);
#endif
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
INTERFLOW_INLINE void store(BFloat16* p, Vec<float> v) {
  U32x8 word = bits<U32x8>(v);
  U32x8 rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  U32x8 nan = (U32x8)is_nan(v);
  U16x8 narrow = __builtin_convertvector((nan & 0x7fc0u) | (~nan & rounded), U16x8);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
INTERFLOW_INLINE void store(Half* p, Vec<float> v) {
#if defined(INTERFLOW_AVX2)
  __m128i narrow = _mm256_cvtps_ph(bits<__m256>(v), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &narrow, sizeof narrow);
#else
  // Onto fp16's grid: above 2^-14 keep 11 bits, below it multiples of 2^-24 (the last place of 0.75); from 65520 on infinity
  U32x8 word = bits<U32x8>(v), sign = word & 0x80000000u;
  Vec<float> magnitude = bits<Vec<float>>(word & 0x7fffffffu);
  Vec<float> normal = bits<Vec<float>>((bits<U32x8>(magnitude) + 0xfffu + ((word >> 13) & 1u)) & 0xffffe000u);
  Vec<float> grid = select(less(magnitude, broadcast(0x1p-14f)), (magnitude + broadcast(0.75f)) - broadcast(0.75f), normal);
  grid = select(less(grid, broadcast(65536.0f)), grid, broadcast(__builtin_inff()));
  grid = select(is_nan(magnitude), magnitude, grid);
  store_exact(p, bits<Vec<float>>(bits<U32x8>(grid) | sign));
#endif
}
template <class T, class V>
INTERFLOW_INLINE void store_partial(T* p, V v, int64_t n) {
  T values[sizeof(V) / sizeof(v[0])];
  store(values, v);
  copy_few<int64_t(sizeof values)>(p, values, n * int64_t(sizeof(T)));
}

// --- rounding to a storage type, staying in Acc -----------------------------------------------------------------------
// x is a sum of two numbers of type T (or one): its NaNs are quiet and have none of the bits that are cut off.
template <class T, class Acc>
INTERFLOW_INLINE Vec<Acc> rounded_sum(Vec<Acc> x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    U32x8 word = bits<U32x8>(x);
    return bits<Vec<float>>((word + 0x7fffu + ((word >> 16) & 1u)) & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, Half>) {
    // Sums are multiples of 2^-24, so those below fp16's normal range are exact; above it 11 bits are kept, beyond 65504 infinity.
    U32x8 word = bits<U32x8>(x);
    Vec<float> y = bits<Vec<float>>((word + 0xfffu + ((word >> 13) & 1u)) & 0xffffe000u);
    U32x8 infinity = (bits<U32x8>(y) & 0x80000000u) | 0x7f800000u;
    Vec<float> magnitude = bits<Vec<float>>(bits<U32x8>(y) & 0x7fffffffu);
    return select(less_equal(broadcast(65536.0f), magnitude), bits<Vec<float>>(infinity), y);
  } else {
    return x;
  }
}

// --- lanes of small numbers as bytes, and bits ---------------------------------------------------------------------------
template <class Acc>
struct BytesOf {
  typedef uint8_t type __attribute__((vector_size(kLanes<Acc>)));
};
template <class Acc>
using Bytes = typename BytesOf<Acc>::type;

template <class Acc>
INTERFLOW_INLINE Bytes<Acc> to_bytes(Lanes<Acc> small) {
#if defined(INTERFLOW_AVX2)
  if constexpr (sizeof(Acc) == 4) {
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(bits<__m256i>(small)), _mm256_extracti128_si256(bits<__m256i>(small), 1));
    return bits<Bytes<Acc>>(_mm_cvtsi128_si64(_mm_packus_epi16(words, words)));
  }
#endif
  return __builtin_convertvector(small, Bytes<Acc>);
}
template <class Acc>
INTERFLOW_INLINE Lanes<Acc> from_bytes(Bytes<Acc> bytes) {
  return __builtin_convertvector(bytes, Lanes<Acc>);
}

// Bit j: lane j's sign.
template <class Acc>
INTERFLOW_INLINE unsigned sign_bits(Lanes<Acc> mask) {
#if defined(INTERFLOW_AVX2)
  if constexpr (sizeof(Acc) == 4)
    return unsigned(_mm256_movemask_ps(bits<__m256>(mask)));
  else
    return unsigned(_mm256_movemask_pd(bits<__m256d>(mask)));
#elif defined(__x86_64__)
  __m128i half[2];
  __builtin_memcpy(half, &mask, sizeof half);
  if constexpr (sizeof(Acc) == 4)
    return unsigned(_mm_movemask_ps(_mm_castsi128_ps(half[0])) | _mm_movemask_ps(_mm_castsi128_ps(half[1])) << 4);
  else
    return unsigned(_mm_movemask_pd(_mm_castsi128_pd(half[0])) | _mm_movemask_pd(_mm_castsi128_pd(half[1])) << 2);
#else
  unsigned found = 0;
  for (int j = 0; j < kLanes<Acc>; ++j) found |= unsigned(mask[j] < 0) << j;
  return found;
#endif
}
// The inverse: all bits of lane j where bit j is set.
template <class Acc>
INTERFLOW_INLINE Lanes<Acc> lanes_of_bits(unsigned found) {
  Lanes<Acc> one = (Lanes<Acc>{} + 1) << lane_numbers<Acc>();
  return less(Lanes<Acc>{}, (Lanes<Acc>{} + int(found)) & one);
}

// One number, rounded to a dtype that is known at run time only.
template <class Acc>
INTERFLOW_INLINE void put(void* out, DType dtype, int64_t at, Acc value) {
  switch (dtype) {
    case DType::F32: static_cast<float*>(out)[at] = float(value); return;
    case DType::F64: static_cast<double*>(out)[at] = double(value); return;
    case DType::BF16: static_cast<BFloat16*>(out)[at] = BFloat16(float(value)); return;
    case DType::F16: static_cast<Half*>(out)[at] = Half(float(value)); return;
  }
}

}  // namespace interflow::INTERFLOW_ISA
