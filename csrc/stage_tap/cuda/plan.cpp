// Which maps the stage tap's kernels take, and the plan of those.
#include "stage_tap/cuda/host.h"

namespace interflow {

TapPlan plan_tap_units(const TapShape& s, DType dtype, bool max_pool, const char* op) {
  INTERFLOW_CHECK(dtype != DType::F64, op, ": fp64 has no CUDA kernel; use backend('eager'), or fp32, bf16 or fp16");
  INTERFLOW_CHECK(s.height <= kMostMapPixels && s.width <= kMostMapPixels && s.pixels() <= kMostMapPixels, op,
                  ": a map may have up to 2^30 pixels on a GPU, got H = ", s.height, " and W = ", s.width);
  int64_t units = 0;
  TapPlan plan = plan_tap(s, dtype, max_pool, units);
  INTERFLOW_CHECK(units < int64_t(1) << 31, op, ": too many maps for one launch, got B = ", s.batch, " and C = ", s.channels);
  return plan;
}

}  // namespace interflow
