// stage_tap on a GPU: check, guard, sizes, allocate, params, launch, check the launch, return.
#include <algorithm>

#include "stage_tap/cuda/host.h"

namespace interflow {
namespace {

constexpr const char* kTap = "stage_tap";

std::tuple<Tensor, Tensor, Tensor> stage_tap(const Tensor& u, const OptionalTensor& shift, bool max_pool, bool need_mask) {
  TapShape s = check_tap(u, shift, kTapPlace);
  DType dtype = dtype_of(u, kTap, "u");
  OnDevice guard(u);
  TapPlan plan = plan_tap_units(s, dtype, max_pool, kTap);
  ScalarType type = u.scalar_type();

  // Allocate
  Tensor m = max_pool ? new_map(u, s.batch, s.channels, s.height / 2, s.width / 2, s.channels_last, type) : new_tensor(u, {0}, type);
  Tensor p = new_tensor(u, {s.batch, s.channels}, ScalarType::Float);
  Tensor mask = new_tensor(u, {need_mask ? s.batch * s.mask_bytes(max_pool) : 0}, ScalarType::Byte);
  if (s.batch == 0 || s.channels == 0) return {m, p, mask};
  bool reduces = plan.parts > 1;
  Tensor partial = new_tensor(u, {reduces ? s.batch * plan.parts * s.channels : 0}, ScalarType::Float);

  // Params
  TapParams P{};
  P.plan = plan;
  P.u = readable(u);
  P.stride_b = s.batch == 1 ? 0 : u.stride(0), P.stride_c = s.channels == 1 ? 0 : u.stride(1);
  P.stride_h = s.height == 1 ? 0 : u.stride(2), P.stride_w = s.width == 1 ? 1 : u.stride(3);
  int64_t size = element_size(dtype), vector = tap_vector(dtype, max_pool);
  bool whole = (s.channels_last ? s.channels : max_pool ? s.width : s.pixels()) % vector == 0;  // all pieces are
  bool runs = P.stride_w == 1 && (s.height == 1 || P.stride_h == s.width), dense = runs && (s.channels == 1 || P.stride_c == s.pixels());
  P.access = int32_t(size);
  if (s.channels_last)
    P.access = widest_access(P.u, {P.stride_b * size, P.stride_h * size, P.stride_w * size, s.channels * size});
  else if (max_pool && P.stride_w == 1)
    P.access = widest_access(P.u, {P.stride_b * size, P.stride_c * size, P.stride_h * size});
  else if (!max_pool && runs)
    P.access = widest_access(P.u, {P.stride_b * size, P.stride_c * size, s.pixels() * size});
  if (max_pool) {
    P.m = writable(m);
    P.m_access = widest_access(P.m, {(s.channels_last ? s.channels : s.width / 2) * size});
    whole = whole && P.m_access >= (s.channels_last ? 16 : 8);  // always: allocators align
  }
  P.path = whole && P.access == 16 ? TapPath::Wide : dense && can_stage(plan) ? TapPath::Staged : TapPath::Narrow;
  P.runs = runs;
  if (shift) {
    P.shift = readable(*shift), P.shift_dtype = dtype_of(*shift, kTap, "shift"), P.shift_stride = s.channels == 1 ? 1 : shift->stride(0);
    P.shift_wide = P.shift_stride == 1 && whole && widest_access(P.shift, {}) == 16;
  }
  P.p = static_cast<float*>(writable(p));
  P.mask = need_mask ? static_cast<uint8_t*>(writable(mask)) : nullptr;
  if (reduces) {
    P.partial = static_cast<float*>(writable(partial));
    P.arrivals = counters(guard.device(), guard.stream(), s.batch * plan.slabs);
  }
  P.stream = is_stream(plan);

  check_launch(launch_tap(P, guard.stream()), kTap, "the forward kernel");
  return {m, p, mask};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("stage_tap", TORCH_BOX(&interflow::stage_tap)); }
