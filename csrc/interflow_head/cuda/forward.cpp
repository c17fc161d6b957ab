// interflow_head on a GPU: check, guard, schedule, allocate, params, one launch, return.
#include <cstdlib>

#include "interflow_head/cuda/host.h"

namespace interflow {
namespace {

// INTERFLOW_WATCHDOG=1: a kernel that waits too long for another block traps and says for what, instead of hanging.
bool watchdog_asked() {
  const char* text = std::getenv("INTERFLOW_WATCHDOG");
  if (!text || !*text) return false;
  INTERFLOW_CHECK((text[0] == '0' || text[0] == '1') && !text[1], "INTERFLOW_WATCHDOG must be 0 or 1, got '", text, "'");
  return text[0] == '1';
}

std::tuple<Tensor, Tensor, Tensor> interflow_head(const std::vector<Tensor>& features, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& attention_weight,
                                                  const OptionalTensor& attention_bias, const std::string& attention, const std::vector<int64_t>& pool_size, bool need_branches,
                                                  std::optional<ScalarType> dtype) {
  // Check
  check_call(features, pool_size);
  Attention mode = attention_of(attention);
  HeadForward P{};
  std::vector<int64_t> begin{0};
  int64_t bytes = head_maps(P.maps, features, pool_size, weight, "weight", begin, kHead);
  int64_t n = int64_t(features.size()), batch = features[0].size(0), width = begin.back();
  check_parameters(weight, bias, n, width);
  check_attention(mode, attention_weight, attention_bias, n, weight.size(0));
  ScalarType out_type = dtype.value_or(weight.scalar_type());

  // Guard and allocate
  OnDevice on(weight);
  std::vector<Tensor> held;
  P.tail = head_tail(batch, begin, weight, bias, attention_weight, attention_bias, mode, kHead, held);
  int64_t classes = P.tail.classes;
  Tensor pooled = new_tensor(weight, {batch, width}, ScalarType::Float);
  Tensor y = new_tensor(weight, {batch, classes}, out_type);
  Tensor branches = need_branches ? new_tensor(weight, {batch, n, classes}, out_type) : new_tensor(weight, {0}, out_type);
  P.out = dtype_of(y, kHead, "dtype");
  INTERFLOW_CHECK(P.out != DType::F64, kHead, kNoDoubles, ", got dtype fp64");
  if (batch == 0) return {y, branches, pooled};

  // Schedule
  P.branches = need_branches ? writable(branches) : nullptr;
  INTERFLOW_CHECK(schedule_head(P.schedule, P.maps, int(n), batch, classes, classes * width * element_size(P.tail.weight_dtype), wide_classes(P.by_branch())), kHead,
                  ": features must be smaller: a map of 2^30 pixels, a group of 2^31 planes or a batch of 2^31 tickets is beyond the kernel, got batch ", batch);
  Tensor partial = new_tensor(weight, {place_parts(P)}, ScalarType::Float);

  // Params
  for (int i = 0; i < n; ++i) P.maps[i].data = readable(features[size_t(i)]);
  P.pooled = static_cast<float*>(writable(pooled));
  set_pooled(P.tail, P.pooled);
  P.partial = static_cast<float*>(writable(partial));
  P.counters = counters(on.device(), on.stream(), P.schedule.counters());
  P.y = writable(y);
  P.stream = bytes > l2_bytes() / 3 * 2;
  P.watchdog = watchdog_asked();

  // Launch
  check_launch(launch_head_forward(P, on.stream()), kHead, "interflow_head_forward_kernel");
  return {y, branches, pooled};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("interflow_head", TORCH_BOX(&interflow::interflow_head)); }
