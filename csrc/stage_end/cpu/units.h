// The stage end's kernel of a dtype, a layout and what there is to add.

namespace interflow::INTERFLOW_ISA {

// f(b1, b2) with two switches as types.
template <class F>
INTERFLOW_INLINE void with_switches(bool first, bool second, F f) {
  if (first)
    second ? f(std::true_type{}, std::true_type{}) : f(std::true_type{}, std::false_type{});
  else
    second ? f(std::false_type{}, std::true_type{}) : f(std::false_type{}, std::false_type{});
}

template <class Acc, class T>
void end_typed(const EndParams& P, int64_t image, int64_t part) {
  with_switches(P.relu, P.residual.data, [&](auto relu, auto residual) {
    constexpr bool kRelu = decltype(relu)::value, kResidual = decltype(residual)::value;
    P.plan.shape.channels_last ? end_pixels<kRelu, kResidual, Acc, T>(P, image, part) : end_planes<kRelu, kResidual, Acc, T>(P, image, part);
  });
}

template <class Acc, class T>
void end_backward_typed(const EndBackwardParams& P, int64_t image, int64_t part) {
  with_switches(P.v.data, P.dv.data, [&](auto relu, auto upstream) {
    constexpr bool kRelu = decltype(relu)::value, kUpstream = decltype(upstream)::value;
    P.plan.shape.channels_last ? end_pixels_backward<kRelu, kUpstream, Acc, T>(P, image, part)
                               : end_planes_backward<kRelu, kUpstream, Acc, T>(P, image, part);
  });
}

void end_unit(const EndParams& P, int64_t image, int64_t part) {
  switch (P.plan.dtype) {
    case DType::F32: return end_typed<float, float>(P, image, part);
    case DType::F64: return end_typed<double, double>(P, image, part);
    case DType::BF16: return end_typed<float, BFloat16>(P, image, part);
    case DType::F16: return end_typed<float, Half>(P, image, part);
  }
}

void end_backward_unit(const EndBackwardParams& P, int64_t image, int64_t part) {
  switch (P.plan.dtype) {
    case DType::F32: return end_backward_typed<float, float>(P, image, part);
    case DType::F64: return end_backward_typed<double, double>(P, image, part);
    case DType::BF16: return end_backward_typed<float, BFloat16>(P, image, part);
    case DType::F16: return end_backward_typed<float, Half>(P, image, part);
  }
}

}  // namespace interflow::INTERFLOW_ISA
