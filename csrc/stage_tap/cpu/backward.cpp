// stage_tap_backward on the CPU: check, sizes, allocate, params, launch (one parallel region), sum d(shift), return.
#include <memory>

#include "common/cpu/huge_pages.h"
#include "stage_tap/cpu/host.h"

namespace interflow {
namespace {

constexpr const char* kTapBackward = "stage_tap_backward";

template <class Acc>
std::tuple<Tensor, Tensor> run(const OptionalTensor& dm, const OptionalTensor& dp, const Tensor& mask, const Tensor& like, const TapPlan& plan, bool need_shift) {
  const TapShape& s = plan.shape;
  ScalarType type = like.scalar_type(), acc_type = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;

  // Allocate
  Tensor du = new_map(mask, s.batch, s.channels, s.height, s.width, s.channels_last, type);
  Tensor dshift = new_tensor(mask, {need_shift ? s.channels : 0}, acc_type);
  if (s.batch == 0 || s.channels == 0) {
    if (need_shift) torch::stable::zero_(dshift);
    return {du, dshift};
  }
  advise_huge_pages(du.mutable_data_ptr(), du.numel() * element_size(plan.dtype));
  int64_t rows = s.channels_last ? plan.parts : 1;  // of dshift's terms, an image
  std::unique_ptr<Acc[]> terms(need_shift ? new Acc[size_t(s.batch * rows * s.channels)] : nullptr);

  // Launch
  TapBackwardParams P{};
  P.plan = plan;
  if (dm && plan.max_pool) {
    P.dm = dm->const_data_ptr();
    P.dm_stride_b = dm->stride(0), P.dm_stride_c = dm->stride(1), P.dm_stride_h = dm->stride(2), P.dm_stride_w = dm->stride(3);
  }
  Tensor dense = dp ? contiguous(*dp, kTapBackward, "dp") : mask;
  P.dp = dp ? dense.const_data_ptr() : nullptr;
  P.mask = static_cast<const uint8_t*>(mask.const_data_ptr());
  P.du = du.mutable_data_ptr();
  P.dshift = terms.get();
  run_units(tap_kernels().backward, P);
  if (need_shift) sum_rows(terms.get(), s.batch * rows, s.channels, static_cast<Acc*>(dshift.mutable_data_ptr()));
  return {du, dshift};
}

std::tuple<Tensor, Tensor> stage_tap_backward(const OptionalTensor& dm, const OptionalTensor& dp, const Tensor& mask, const Tensor& like, bool max_pool,
                                              bool channels_last, bool need_shift) {
  TapShape shape = check_tap_backward(dm, dp, mask, like, max_pool, channels_last, kTapPlace);
  DType dtype = dtype_of(like, kTapBackward, "like");
  TapPlan plan = plan_tap(shape, dtype, max_pool);
  return within_memory(kTapBackward, [&] {
    return dtype == DType::F64 ? run<double>(dm, dp, mask, like, plan, need_shift) : run<float>(dm, dp, mask, like, plan, need_shift);
  });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) { m.impl("stage_tap_backward", TORCH_BOX(&interflow::stage_tap_backward)); }
