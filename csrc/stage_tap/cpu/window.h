// One 2x2 window, a vector of windows at a time: rectify, take the maximum, and the gradient back.

namespace interflow::INTERFLOW_ISA {

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
