// stage_end_backward on a GPU: check, guard, sizes, allocate, params, launch, check the launch, return.
#include "stage_end/cuda/host.h"

namespace interflow {
namespace {

constexpr const char* kEndBackward = "stage_end_backward";

std::tuple<Tensor, Tensor> stage_end_backward(const OptionalTensor& dv, const OptionalTensor& dp, const OptionalTensor& v, const Tensor& like, bool channels_last,
                                              bool need_shift) {
  MapShape s = check_end_backward(dv, dp, v, like, channels_last, kEndPlace);
  DType dtype = dtype_of(like, kEndBackward, "like");
  OnDevice guard(like);
  EndPlan plan = plan_end_units(s, dtype, kEndBackward);

  // Allocate
  Tensor du = new_map(like, s.batch, s.channels, s.height, s.width, s.channels_last, like.scalar_type());
  Tensor dshift = new_tensor(like, {need_shift ? s.channels : 0}, ScalarType::Float);
  if (s.batch == 0 || s.channels == 0 || !(dv || dp)) {  // no gradient: zeros
    torch::stable::zero_(du);
    if (need_shift) torch::stable::zero_(dshift);
    return {du, dshift};
  }
  ReductionRows reduction(plan);
  Tensor terms = new_tensor(like, {need_shift ? (reduction.rows + reduction.levels) * s.channels : 0}, ScalarType::Float);

  // Params
  EndBackwardParams P{};
  P.plan = plan;
  if (dv) P.dv = end_map(*dv, plan), P.dv.map.data = readable(*dv);
  if (v) P.v = end_map(*v, plan), P.v.map.data = readable(*v);
  P.du = writable(du), P.du_access = end_map(du, plan).access;
  P.wide = is_wide(plan, P.dv, P.v, P.du_access);
  if (dp) {
    P.dp = static_cast<const float*>(readable(*dp)), P.dp_stride_b = dp->stride(0), P.dp_stride_c = dp->stride(1);
    P.dp_wide = P.dp_stride_c == 1 && plan.whole && widest_access(P.dp, {P.dp_stride_b * 4}) == 16;
  }
  if (need_shift) {
    P.dshift = static_cast<float*>(writable(dshift));
    P.rows = static_cast<float*>(writable(terms)), P.sums = P.rows + reduction.rows * s.channels;
    P.row_count = int32_t(reduction.rows), P.rows_at_once = int32_t(reduction.at_once);
    P.arrivals = counters(guard.device(), guard.stream(), (reduction.levels + 1) * plan.slabs);
  }
  P.stream = is_stream(plan);

  check_launch(launch_end_backward(P, guard.stream()), kEndBackward, "the backward kernel");
  return {du, dshift};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("stage_end_backward", TORCH_BOX(&interflow::stage_end_backward)); }
