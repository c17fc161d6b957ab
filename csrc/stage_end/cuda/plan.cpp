// Which maps the stage end's kernels take, the plan of those, and how each is reached.
#include "stage_end/cuda/host.h"

namespace interflow {

EndPlan plan_end_units(const MapShape& s, DType dtype, const char* op) {
  INTERFLOW_CHECK(dtype != DType::F64, op, ": fp64 has no CUDA kernel; use backend('eager'), or fp32, bf16 or fp16");
  INTERFLOW_CHECK(s.height <= kMostMapPixels && s.width <= kMostMapPixels && s.pixels() <= kMostMapPixels, op,
                  ": a map may have up to 2^30 pixels on a GPU, got H = ", s.height, " and W = ", s.width);
  int64_t units = 0;
  EndPlan plan = plan_end(s, dtype, units);
  INTERFLOW_CHECK(units < int64_t(1) << 31, op, ": too many maps for one launch, got B = ", s.batch, " and C = ", s.channels);
  return plan;
}

EndMap end_map(const Tensor& t, const EndPlan& plan) {
  const MapShape& s = plan.shape;
  int64_t size = element_size(plan.dtype), pixels = s.pixels();
  EndMap m{};
  m.map.stride_b = s.batch == 1 ? 0 : t.stride(0), m.map.stride_c = s.channels == 1 ? 1 : t.stride(1);
  m.map.stride_h = s.height == 1 ? 0 : t.stride(2), m.map.stride_w = s.width > 1 ? t.stride(3) : s.channels_last ? m.map.stride_h : 1;
  const void* data = t.const_data_ptr();
  if (s.channels_last) {
    bool runs = m.map.stride_c == 1;
    bool row = s.width == 1 || m.map.stride_w == s.channels, rows = s.height == 1 || m.map.stride_h == s.width * s.channels;
    m.dense = runs && row && rows && s.channels * pixels < int64_t(1) << 30;
    m.access = runs ? widest_access(data, {m.map.stride_b * size, m.map.stride_h * size, m.map.stride_w * size, s.channels * size}) : int32_t(size);
    return m;
  }
  m.dense = true;
  bool runs = m.map.stride_w == 1 && (s.height == 1 || m.map.stride_h == s.width) && (s.channels == 1 || m.map.stride_c == pixels);
  int64_t slab = plan.slabs > 1 ? plan.slab * pixels : 0, part = plan.parts > 1 ? int64_t(plan.part_size) | pixels : 0;
  m.access = runs ? widest_access(data, {m.map.stride_b * size, s.channels * pixels * size, slab * size, part * size}) : 0;
  return m;
}

}  // namespace interflow
