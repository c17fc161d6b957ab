// Vectors of 32 bytes in the compilers' own vector extension: their types, and what is done lane by lane: compare, choose, shuffle.
// Nothing about one operator. No include guard: see vector.h, which includes it.

namespace interflow::INTERFLOW_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(32)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(32)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = 32 / sizeof(T);

typedef uint32_t U32x8 __attribute__((vector_size(32)));
typedef uint16_t U16x8 __attribute__((vector_size(16)));

#define INTERFLOW_INLINE inline __attribute__((always_inline))
#define INTERFLOW_LAMBDA __attribute__((always_inline))

// What comparisons of Vec<Acc> give: all bits of a lane or none.
template <class Acc>
using Lanes = decltype(Vec<Acc>{} < Vec<Acc>{});
typedef Lanes<float> I32x8;

template <class Acc>
INTERFLOW_INLINE Lanes<Acc> lane_numbers() {
  if constexpr (sizeof(Acc) == 4)
    return Lanes<Acc>{0, 1, 2, 3, 4, 5, 6, 7};
  else
    return Lanes<Acc>{0, 1, 2, 3};
}

template <class To, class From>
INTERFLOW_INLINE To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

template <class V, class T>
INTERFLOW_INLINE V load_bytes(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// --- what GCC would take apart lane by lane where registers have 16 bytes: done in two halves there --------------------
template <class E>
struct HalfOf {
  typedef E type __attribute__((vector_size(16)));
};
template <class V>
using HalfVec = typename HalfOf<std::remove_cv_t<std::remove_reference_t<decltype(std::declval<V>()[0])>>>::type;

template <class V>
INTERFLOW_INLINE HalfVec<V> half(const V& v, int which) {
  return load_bytes<HalfVec<V>>(reinterpret_cast<const char*>(&v) + 16 * which);
}
template <class V, class H>
INTERFLOW_INLINE V join(H low, H high) {
  static_assert(2 * sizeof(H) == sizeof(V));
  V v;
  __builtin_memcpy(&v, &low, 16);
  __builtin_memcpy(reinterpret_cast<char*>(&v) + 16, &high, 16);
  return v;
}

template <class Result, class F, class... V>
INTERFLOW_INLINE Result lanewise(F f, const V&... v) {
#if defined(INTERFLOW_AVX2)
  return f(v...);
#else
  return join<Result>(f(half(v, 0)...), f(half(v, 1)...));
#endif
}
template <class V>
using LanesOf = decltype(V{} < V{});

template <class V>
INTERFLOW_INLINE LanesOf<V> less(V a, V b) {
  return lanewise<LanesOf<V>>([](auto x, auto y) INTERFLOW_LAMBDA { return x < y; }, a, b);
}
template <class V>
INTERFLOW_INLINE LanesOf<V> less_equal(V a, V b) {
  return lanewise<LanesOf<V>>([](auto x, auto y) INTERFLOW_LAMBDA { return x <= y; }, a, b);
}
template <class V>
INTERFLOW_INLINE LanesOf<V> is_nan(V a) {
  return lanewise<LanesOf<V>>([](auto x) INTERFLOW_LAMBDA { return x != x; }, a);
}
// All bits of a lane where it has one of `some`.
template <class L>
INTERFLOW_INLINE L has_bits(L a, int some) {
  return lanewise<L>([&](auto x) INTERFLOW_LAMBDA { return (x & some) != 0; }, a);
}
template <class L, class V>
INTERFLOW_INLINE V select(L mask, V a, V b) {
  return lanewise<V>([](auto m, auto x, auto y) INTERFLOW_LAMBDA { return m ? x : y; }, mask, a, b);
}

// All bits of the first n lanes; n may be negative or more than there are.
template <class Acc>
INTERFLOW_INLINE Lanes<Acc> first_lanes(int64_t n) {
  return less(lane_numbers<Acc>(), Lanes<Acc>{} + int(n));
}

template <int... I, class V>
INTERFLOW_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, LanesOf<V>{I...});
#endif
}

template <class Acc>
INTERFLOW_INLINE Vec<Acc> broadcast(Acc x) {
  return x - Vec<Acc>{};
}

}  // namespace interflow::INTERFLOW_ISA
