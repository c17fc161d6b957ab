// interflow_pool on a GPU: check, guard, schedule, allocate, params, one launch, return.
#include "interflow_head/cuda/host.h"

namespace interflow {
namespace {

Tensor interflow_pool(const std::vector<Tensor>& features, const std::vector<int64_t>& pool_size) {
  // Check
  check_call(features, pool_size, kPool);
  HeadForward P{};
  std::vector<int64_t> begin{0};
  int64_t bytes = head_maps(P.maps, features, pool_size, features[0], "features[0]", begin, kPool);
  int64_t n = int64_t(features.size()), batch = features[0].size(0), width = begin.back();

  // Guard and allocate
  OnDevice on(features[0]);
  Tensor pooled = new_tensor(features[0], {batch, width}, ScalarType::Float);
  if (batch == 0) return pooled;

  // Schedule: of no classes, so without a tail
  INTERFLOW_CHECK(schedule_head(P.schedule, P.maps, int(n), batch, 0, 0, kWideClasses), kPool,
                  ": features must be smaller: a map of 2^30 pixels, a group of 2^31 planes or a batch of 2^31 tickets is beyond the kernel, got batch ", batch);
  if (P.schedule.tickets == 0) return pooled;
  Tensor partial = new_tensor(features[0], {place_parts(P)}, ScalarType::Float);

  // Params
  for (int i = 0; i < n; ++i) P.maps[i].data = readable(features[size_t(i)]);
  P.tail.count = int(n), P.tail.batch = batch, P.tail.width = width;
  P.pooled = static_cast<float*>(writable(pooled));
  P.partial = static_cast<float*>(writable(partial));
  P.counters = counters(on.device(), on.stream(), P.schedule.counters());
  P.stream = bytes > l2_bytes() / 3 * 2;

  // Launch
  check_launch(launch_head_pool(P, on.stream()), kPool, "interflow_pool_kernel");
  return pooled;
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("interflow_pool", TORCH_BOX(&interflow::interflow_pool)); }
