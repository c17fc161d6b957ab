// One 2x2 window, a vector of windows at a time: rectify, take the maximum, and the gradient back. And the sum of a map.

namespace interflow::INTERFLOW_ISA {

// Vectors, or windows or pixels of a channel, that are summed in Acc.
template <class Acc>
constexpr int64_t kTapRun = kRun<Acc>;

template <class Acc>
struct TapSum {
  Vec<Acc> few{};
  LongVector<Acc> all{};
  int64_t count = 0;

  // v: the sum of so many vectors, at most kTapRun<Acc>.
  INTERFLOW_INLINE void add(Vec<Acc> v, int64_t vectors) {
    few += v;
    if ((count += vectors) >= kTapRun<Acc>) carry();
  }
  INTERFLOW_INLINE void carry() {
    all.add(few);
    few = Vec<Acc>{}, count = 0;
  }
  INTERFLOW_INLINE double total() {
    carry();
    return all.total();
  }
};

// relu(u + shift), rounded to T at each step. NaN stays NaN, -0 stays -0.
template <class T, class Acc>
INTERFLOW_INLINE Vec<Acc> rectified(Vec<Acc> u, Vec<Acc> shift) {
  Vec<Acc> x = rounded_sum<T, Acc>(u + shift);
  return select(less(x, Vec<Acc>{}), Vec<Acc>{}, x);
}

// Whether the gradient passes a rectified value: not v <= 0.
template <class Acc>
INTERFLOW_INLINE Lanes<Acc> passes(Vec<Acc> v) {
  return ~less_equal(v, Vec<Acc>{});
}

// Four elements of a window: 0 1 in the upper row, 2 3 below.
template <class Acc>
struct TapWindow {
  Vec<Acc> v[4];

  INTERFLOW_INLINE Vec<Acc> sum() const { return (v[0] + v[1]) + (v[2] + v[3]); }

  // As PyTorch scans: the first of equals, the last NaN. With the mask's byte as a lane, if asked for.
  template <bool kMask>
  INTERFLOW_INLINE Vec<Acc> maximum(Lanes<Acc>& byte) const {
    Vec<Acc> m = v[0];
    Lanes<Acc> code = Lanes<Acc>{} + 0x10;
#pragma GCC unroll 3
    for (int j = 1; j < 4; ++j) {
      Lanes<Acc> take = less(m, v[j]) | is_nan(v[j]);
      m = select(take, v[j], m);
      if constexpr (kMask) code = select(take, Lanes<Acc>{} + (0x10 << j), code);
    }
    if constexpr (kMask) {
      Lanes<Acc> pass = passes<Acc>(v[0]) & 1;
#pragma GCC unroll 3
      for (int j = 1; j < 4; ++j) pass |= passes<Acc>(v[j]) & (1 << j);
      byte = pass | (code & (pass << 4));
    }
    return m;
  }
};

// The gradients of a window's elements from the mask's byte, gm of its maximum and gp of each that passes.
template <class Acc>
struct TapGradient {
  Vec<Acc> d[4];

  INTERFLOW_INLINE TapGradient(Lanes<Acc> byte, Vec<Acc> gm, Vec<Acc> gp) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      Lanes<Acc> pass = has_bits(byte, 1 << j), is_maximum = has_bits(byte, 0x10 << j);
      d[j] = bits<Vec<Acc>>(pass & bits<Lanes<Acc>>(gp + bits<Vec<Acc>>(is_maximum & bits<Lanes<Acc>>(gm))));
    }
  }

  INTERFLOW_INLINE Vec<Acc> sum() const { return (d[0] + d[1]) + (d[2] + d[3]); }
};

}  // namespace interflow::INTERFLOW_ISA
