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
  int64_t n = int64_t(features.size()), batch = features[0].dim() > 0 ? features[0].size(0) : 0, width = 0, bytes = 0;
  HeadForward P{};
  std::vector<int64_t> begin{0};
  for (int64_t i = 0; i < n; ++i) {
    const Tensor& x = features[size_t(i)];
    Stage& s = P.maps[i] = stage_of(x, i, pool_size[0], pool_size[1]);
    INTERFLOW_CHECK(s.dtype != DType::F64, kHead, kNoDoubles, ", got features[", i, "] in fp64");
    INTERFLOW_CHECK(x.size(0) == batch, kHead, ": features[", i, "] must have the batch of features[0], ", batch, ", got ", shape_text(x));
    INTERFLOW_CHECK(on_device(x) && x.get_device_index() == weight.get_device_index(), kHead, ": features[", i, "] must be on the device of weight");
    s.column = width;
    add_width(s, width);
    begin.push_back(width);
    bytes += batch * s.channels * s.height * s.width * element_size(s.dtype);
  }
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
  for (int i = 0; i < n; ++i) {
    P.partial_begin[i] = P.partial_group;
    const StageSchedule& s = P.schedule.stages[i];
    P.partial_group += int64_t(s.meetings(P.schedule.group_images)) * s.parts * s.width();
    P.partial_group = ceil_div(P.partial_group, 4) * 4;
  }
  Tensor partial = new_tensor(weight, {P.partial_group * P.schedule.groups}, ScalarType::Float);

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
