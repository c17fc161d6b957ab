// The sample's host side: an operator like the others, but for its schema, which stands here.
#include "common/cuda/host.h"
#include "sample_host.h"

namespace interflow {
namespace {

// kernel: sums, copies (x [rows, 4]) -> [rows]; last, tickets -> [1]; product, x [24, 8] -> [16, 8]; lanes, x [1, 32] -> [6, 32].
Tensor sample(const Tensor& x, std::string kernel) {
  OnDevice device(x);
  SampleParams P{};
  P.rows = x.size(0), P.width = x.size(1);
  std::vector<int64_t> shape{kernel == "sums" || kernel == "copies" ? P.rows : 1};
  if (kernel == "product") shape = {16, 8};
  if (kernel == "lanes") shape = {6, 32};
  Tensor y = new_tensor(x, shape, x.scalar_type());
  Tensor partial = new_tensor(x, {P.rows}, x.scalar_type());
  P.x = static_cast<const float*>(readable(x));
  P.y = static_cast<float*>(writable(y));
  P.partial = static_cast<float*>(writable(partial));
  P.counters = counters(device.device(), device.stream(), 2);
  check_launch(launch_sample(kernel, P, device.stream()), "sample", (kernel + "_kernel").c_str());
  return y;
}

}  // namespace
}  // namespace interflow

#define INTERFLOW_SAMPLE_IN(library, m) STABLE_TORCH_LIBRARY(library, m)
INTERFLOW_SAMPLE_IN(INTERFLOW_LIBRARY, m) { m.def("sample(Tensor x, str kernel) -> Tensor"); }
INTERFLOW_REGISTER(m) { m.impl("sample", TORCH_BOX(&interflow::sample)); }
