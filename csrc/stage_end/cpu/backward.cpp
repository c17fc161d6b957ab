// stage_end_backward on the CPU: check, sizes, allocate, params, launch (one parallel region), sum d(shift), return.
#include <memory>

#include "common/cpu/huge_pages.h"
#include "stage_end/cpu/host.h"

namespace interflow {
namespace {

constexpr const char* kEndBackward = "stage_end_backward";

template <class Acc>
std::tuple<Tensor, Tensor> run(const OptionalTensor& dv, const OptionalTensor& dp, const OptionalTensor& v, const Tensor& like, const EndPlan& plan, bool need_shift) {
  const MapShape& s = plan.shape;

  // Allocate
  Tensor du = new_map(like, s.batch, s.channels, s.height, s.width, s.channels_last, like.scalar_type());
  Tensor dshift = new_tensor(like, {need_shift ? s.channels : 0}, accumulation_type(plan.dtype));
  if (s.batch == 0 || s.channels == 0 || !(dv || dp)) {  // no gradient: zeros
    torch::stable::zero_(du);
    if (need_shift) torch::stable::zero_(dshift);
    return {du, dshift};
  }
  advise_huge_pages(du.mutable_data_ptr(), du.numel() * element_size(plan.dtype));
  int64_t rows = s.channels_last ? plan.parts : 1;  // of dshift's terms, an image
  std::unique_ptr<Acc[]> terms(need_shift ? new Acc[size_t(s.batch * rows * s.channels)] : nullptr);

  // Launch
  EndBackwardParams P{};
  P.plan = plan;
  P.dv = strided(dv, plan.dtype), P.v = strided(v, plan.dtype);
  Tensor dense = dp ? contiguous(*dp, kEndBackward, "dp") : like;
  P.dp = dp ? dense.const_data_ptr() : nullptr;
  P.du = du.mutable_data_ptr();
  P.dshift = terms.get();
  run_units(end_kernels().backward, P);
  if (need_shift) sum_rows(terms.get(), s.batch * rows, s.channels, static_cast<Acc*>(dshift.mutable_data_ptr()));
  return {du, dshift};
}

std::tuple<Tensor, Tensor> stage_end_backward(const OptionalTensor& dv, const OptionalTensor& dp, const OptionalTensor& v, const Tensor& like, bool channels_last,
                                              bool need_shift) {
  MapShape shape = check_end_backward(dv, dp, v, like, channels_last, kEndPlace);
  DType dtype = dtype_of(like, kEndBackward, "like");
  EndPlan plan = plan_end(shape, dtype);
  return within_memory(kEndBackward, [&] {
    return dtype == DType::F64 ? run<double>(dv, dp, v, like, plan, need_shift) : run<float>(dv, dp, v, like, plan, need_shift);
  });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) { m.impl("stage_end_backward", TORCH_BOX(&interflow::stage_end_backward)); }
