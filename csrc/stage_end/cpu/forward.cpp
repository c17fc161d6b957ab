// stage_end on the CPU: check, sizes, allocate, params, launch (one parallel region), return.
#include <memory>

#include "common/cpu/huge_pages.h"
#include "common/cpu/isa.h"
#include "stage_end/cpu/host.h"

namespace interflow {

constexpr const char* kEnd = "stage_end";

const EndKernels& end_kernels() {
#if defined(__x86_64__)
  if (use_avx2()) return end_kernels_avx2;
#endif
  return end_kernels_baseline;
}

EndPlan plan_end(const MapShape& s, DType dtype) {
  EndPlan plan{s, dtype, 0, 1};
  if (s.batch == 0 || s.channels == 0) return plan;
  int64_t elements = kUnitBytes / element_size(dtype), all = s.channels_last ? s.pixels() : s.channels;
  // NHWC: few parts, since each leaves C sums
  plan.part_size = s.channels_last ? std::max<int64_t>(8, elements / s.channels) : std::max<int64_t>(1, elements / s.pixels());
  plan.parts = (all + plan.part_size - 1) / plan.part_size;
  return plan;
}

namespace {

template <class Acc>
std::tuple<Tensor, Tensor> run(const Tensor& u, const OptionalTensor& shift, const OptionalTensor& residual, bool relu, const EndPlan& plan) {
  const MapShape& s = plan.shape;

  // Allocate
  Tensor v = new_map(u, s.batch, s.channels, s.height, s.width, s.channels_last, u.scalar_type());
  Tensor p = new_tensor(u, {s.batch, s.channels}, accumulation_type(plan.dtype));
  if (s.batch == 0 || s.channels == 0) return {v, p};
  advise_huge_pages(v.mutable_data_ptr(), v.numel() * element_size(plan.dtype));
  auto values = shift_values<Acc>(shift, s.channels, plan.dtype, kEnd);
  bool reduces = s.channels_last && plan.parts > 1;
  std::unique_ptr<Acc[]> partial(reduces ? new Acc[size_t(s.batch * plan.parts * s.channels)] : nullptr);
  std::unique_ptr<std::atomic<int>[]> arrivals(reduces ? new std::atomic<int>[size_t(s.batch)]() : nullptr);

  // Launch
  EndParams P{};
  P.plan = plan, P.relu = relu;
  P.u = strided(u, plan.dtype), P.residual = strided(residual, plan.dtype);
  P.shift = values.get();
  P.v = v.mutable_data_ptr();
  P.p = p.mutable_data_ptr();
  P.partial = partial.get(), P.arrivals = arrivals.get();
  run_units(end_kernels().forward, P);
  return {v, p};
}

std::tuple<Tensor, Tensor> stage_end(const Tensor& u, const OptionalTensor& shift, const OptionalTensor& residual, const std::string& activation) {
  bool relu = is_relu(activation);
  MapShape shape = check_end(u, shift, residual, kEndPlace);
  DType dtype = dtype_of(u, kEnd, "u");
  EndPlan plan = plan_end(shape, dtype);
  return within_memory(kEnd, [&] { return dtype == DType::F64 ? run<double>(u, shift, residual, relu, plan) : run<float>(u, shift, residual, relu, plan); });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) { m.impl("stage_end", TORCH_BOX(&interflow::stage_end)); }
