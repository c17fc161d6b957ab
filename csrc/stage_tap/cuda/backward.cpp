// stage_tap_backward on a GPU: check, guard, sizes, allocate, params, launch, check the launch, return.
#include "stage_tap/cuda/host.h"

namespace interflow {
namespace {

constexpr const char* kTapBackward = "stage_tap_backward";

std::tuple<Tensor, Tensor> stage_tap_backward(const OptionalTensor& dm, const OptionalTensor& dp, const Tensor& mask, const Tensor& like, bool max_pool,
                                              bool channels_last, bool need_shift) {
  TapShape s = check_tap_backward(dm, dp, mask, like, max_pool, channels_last, kTapPlace);
  DType dtype = dtype_of(like, kTapBackward, "like");
  OnDevice guard(mask);
  TapPlan plan = plan_tap_units(s, dtype, max_pool, kTapBackward);

  // Allocate
  Tensor du = new_map(mask, s.batch, s.channels, s.height, s.width, s.channels_last, like.scalar_type());
  Tensor dshift = new_tensor(mask, {need_shift ? s.channels : 0}, ScalarType::Float);
  if (s.batch == 0 || s.channels == 0) {
    if (need_shift) torch::stable::zero_(dshift);
    return {du, dshift};
  }
  ReductionRows reduction(plan);
  Tensor terms = new_tensor(mask, {need_shift ? (reduction.rows + reduction.levels) * s.channels : 0}, ScalarType::Float);

  // Params
  TapBackwardParams P{};
  P.plan = plan;
  int64_t size = element_size(dtype), vector = tap_vector(dtype, max_pool), out_h = s.height / 2, out_w = s.width / 2;
  if (dm && dm->numel() && max_pool) {
    auto stride = [&](int64_t i) { return dm->size(i) == 1 ? 0 : dm->stride(i); };
    P.dm = readable(*dm);
    P.dm_stride_b = stride(0), P.dm_stride_c = stride(1), P.dm_stride_h = stride(2), P.dm_stride_w = stride(3);
    if (s.channels_last)
      P.dm_wide = P.dm_stride_c == 1 && s.channels % vector == 0 && widest_access(P.dm, {P.dm_stride_b * size, P.dm_stride_h * size, P.dm_stride_w * size}) == 16;
    else
      P.dm_wide = P.dm_stride_w == 1 && s.width % vector == 0 && widest_access(P.dm, {P.dm_stride_b * size, P.dm_stride_c * size, P.dm_stride_h * size}) >= 8;
    P.dm_dense = (out_w == 1 || P.dm_stride_w == 1) && (out_h == 1 || P.dm_stride_h == out_w) && (s.channels == 1 || P.dm_stride_c == out_h * out_w);
  }
  if (dp) {
    P.dp = static_cast<const float*>(readable(*dp)), P.dp_stride_b = dp->stride(0), P.dp_stride_c = dp->stride(1);
    P.dp_wide = P.dp_stride_c == 1 && s.channels % vector == 0 && widest_access(P.dp, {P.dp_stride_b * 4}) == 16;
  }
  P.mask = static_cast<const uint8_t*>(readable(mask));
  P.du = writable(du);
  int64_t run = s.channels_last ? s.channels : max_pool ? s.width : s.pixels();
  P.access = widest_access(P.du, {run * size});
  int32_t mask_access = max_pool ? int32_t(s.channels_last ? vector : vector / 2) : 1;
  bool wide = P.access == 16 && run % vector == 0 && widest_access(P.mask, {}) >= mask_access;
  P.path = wide ? TapPath::Wide : can_stage(plan) ? TapPath::Staged : TapPath::Narrow;
  if (need_shift) {
    P.dshift = static_cast<float*>(writable(dshift));
    P.rows = static_cast<float*>(writable(terms)), P.sums = P.rows + reduction.rows * s.channels;
    P.row_count = int32_t(reduction.rows), P.rows_at_once = int32_t(reduction.at_once);
    P.arrivals = counters(guard.device(), guard.stream(), (reduction.levels + 1) * plan.slabs);
  }
  P.stream = is_stream(plan);

  check_launch(launch_tap_backward(P, guard.stream()), kTapBackward, "the backward kernel");
  return {du, dshift};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("stage_tap_backward", TORCH_BOX(&interflow::stage_tap_backward)); }
