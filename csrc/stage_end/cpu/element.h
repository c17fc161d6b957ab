// What the stage end does to a vector of elements, forward and backward, however they are reached.

namespace interflow::INTERFLOW_ISA {

constexpr int64_t kEndAtOnce = 4;  // vectors of a run, or pixels, that are summed as a tree before they join longer sums

// act((u + shift) + residual), rounded to T at each step.
template <bool kRelu, bool kResidual, class T, class Acc>
INTERFLOW_INLINE Vec<Acc> ended(Vec<Acc> u, Vec<Acc> shift, Vec<Acc> residual) {
  Vec<Acc> x = rounded_sum<T, Acc>(u + shift);
  if constexpr (kResidual) x = rounded_sum<T, Acc>(x + residual);
  if constexpr (kRelu) x = rectify<Acc>(x);
  return x;
}

// dv + gp where v passes, else 0; gp: dp / (H W). Of dv and gp one that is missing is -0.
template <bool kRelu, class Acc>
INTERFLOW_INLINE Vec<Acc> end_gradient(Vec<Acc> dv, Vec<Acc> gp, Vec<Acc> v) {
  Vec<Acc> d = dv + gp;
  if constexpr (kRelu) d = bits<Vec<Acc>>(passes<Acc>(v) & bits<Lanes<Acc>>(d));
  return d;
}

// -0 everywhere, which changes no number that it is added to.
template <class Acc>
INTERFLOW_INLINE Vec<Acc> minus_zero() {
  return -Vec<Acc>{};
}

}  // namespace interflow::INTERFLOW_ISA
