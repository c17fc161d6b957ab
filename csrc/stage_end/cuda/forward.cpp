// stage_end on a GPU: check, guard, sizes, allocate, params, launch, check the launch, return.
#include "stage_end/cuda/host.h"

namespace interflow {
namespace {

constexpr const char* kEnd = "stage_end";

std::tuple<Tensor, Tensor> stage_end(const Tensor& u, const OptionalTensor& shift, const OptionalTensor& residual, const std::string& activation) {
  bool relu = is_relu(activation);
  MapShape s = check_end(u, shift, residual, kEndPlace);
  DType dtype = dtype_of(u, kEnd, "u");
  OnDevice guard(u);
  EndPlan plan = plan_end_units(s, dtype, kEnd);

  // Allocate
  Tensor v = new_map(u, s.batch, s.channels, s.height, s.width, s.channels_last, u.scalar_type());
  Tensor p = new_tensor(u, {s.batch, s.channels}, ScalarType::Float);
  if (s.batch == 0 || s.channels == 0) return {v, p};
  bool reduces = plan.parts > 1;
  Tensor partial = new_tensor(u, {reduces ? s.batch * plan.parts * s.channels : 0}, ScalarType::Float);

  // Params
  EndParams P{};
  P.plan = plan, P.relu = relu;
  P.u = end_map(u, plan), P.u.map.data = readable(u);
  if (residual) P.residual = end_map(*residual, plan), P.residual.map.data = readable(*residual);
  P.v = writable(v), P.v_access = end_map(v, plan).access;
  P.wide = is_wide(plan, P.u, P.residual, P.v_access);
  if (shift) {
    P.shift = readable(*shift), P.shift_dtype = dtype_of(*shift, kEnd, "shift"), P.shift_stride = s.channels == 1 ? 1 : shift->stride(0);
    P.shift_wide = P.shift_stride == 1 && plan.whole && widest_access(P.shift, {}) == 16;
  }
  P.p = static_cast<float*>(writable(p));
  if (reduces) {
    P.partial = static_cast<float*>(writable(partial));
    P.arrivals = counters(guard.device(), guard.stream(), s.batch * plan.slabs);
  }
  P.stream = is_stream(plan);

  check_launch(launch_end(P, guard.stream()), kEnd, "the forward kernel");
  return {v, p};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("stage_end", TORCH_BOX(&interflow::stage_end)); }
