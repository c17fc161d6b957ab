// stage_tap on the CPU: check, sizes, allocate, params, launch (one parallel region), return.
#include <memory>

#include "common/cpu/huge_pages.h"
#include "common/cpu/isa.h"
#include "stage_tap/cpu/host.h"

namespace interflow {

constexpr const char* kTap = "stage_tap";

const TapKernels& tap_kernels() {
#if defined(__x86_64__)
  if (use_avx2()) return tap_kernels_avx2;
#endif
  return tap_kernels_baseline;
}

TapPlan plan_tap(const TapShape& s, DType dtype, bool max_pool) {
  TapPlan plan{s, dtype, max_pool, 0, 1};
  if (s.batch == 0 || s.channels == 0) return plan;
  int64_t element = element_size(dtype), all = s.channels;
  if (s.channels_last) {
    all = max_pool ? s.windows_h() * s.windows_w() : s.pixels();
    plan.part_size = std::max<int64_t>(8, kUnitBytes / (element * (max_pool ? 4 : 1)) / s.channels);  // few parts: each leaves C sums
  } else {
    plan.part_size = std::max<int64_t>(1, kUnitBytes / element / s.pixels());
  }
  plan.parts = (all + plan.part_size - 1) / plan.part_size;
  return plan;
}

namespace {

template <class Acc>
std::tuple<Tensor, Tensor, Tensor> run(const Tensor& u, const OptionalTensor& shift, const TapPlan& plan, bool need_mask) {
  const TapShape& s = plan.shape;
  ScalarType type = u.scalar_type(), acc_type = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;

  // Allocate
  Tensor m = plan.max_pool ? new_map(u, s.batch, s.channels, s.height / 2, s.width / 2, s.channels_last, type) : new_tensor(u, {0}, type);
  Tensor p = new_tensor(u, {s.batch, s.channels}, acc_type);
  Tensor mask = new_tensor(u, {need_mask ? s.batch * s.mask_bytes(plan.max_pool) : 0}, ScalarType::Byte);
  if (s.batch == 0 || s.channels == 0) return {m, p, mask};
  for (const Tensor* t : {&m, &mask}) advise_huge_pages(t->mutable_data_ptr(), t->numel() * (t == &m ? element_size(plan.dtype) : 1));
  auto values = shift_values<Acc>(shift, s.channels, plan.dtype, kTap);
  bool reduces = s.channels_last && plan.parts > 1;
  std::unique_ptr<Acc[]> partial(reduces ? new Acc[size_t(s.batch * plan.parts * s.channels)] : nullptr);
  std::unique_ptr<std::atomic<int>[]> arrivals(reduces ? new std::atomic<int>[size_t(s.batch)]() : nullptr);

  // Launch
  TapParams P{};
  P.plan = plan;
  P.u = u.const_data_ptr();
  P.stride_b = u.stride(0), P.stride_c = u.stride(1), P.stride_h = u.stride(2), P.stride_w = s.width == 1 ? 1 : u.stride(3);
  P.u_end = end_of(u, plan.dtype);
  P.shift = values.get();
  P.m = plan.max_pool ? m.mutable_data_ptr() : nullptr;
  P.p = p.mutable_data_ptr();
  P.mask = need_mask ? static_cast<uint8_t*>(mask.mutable_data_ptr()) : nullptr;
  P.partial = partial.get(), P.arrivals = arrivals.get();
  run_units(tap_kernels().forward, P);
  return {m, p, mask};
}

std::tuple<Tensor, Tensor, Tensor> stage_tap(const Tensor& u, const OptionalTensor& shift, bool max_pool, bool need_mask) {
  TapShape shape = check_tap(u, shift, kTapPlace);
  DType dtype = dtype_of(u, kTap, "u");
  TapPlan plan = plan_tap(shape, dtype, max_pool);
  return within_memory(kTap, [&] { return dtype == DType::F64 ? run<double>(u, shift, plan, need_mask) : run<float>(u, shift, plan, need_mask); });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) { m.impl("stage_tap", TORCH_BOX(&interflow::stage_tap)); }
