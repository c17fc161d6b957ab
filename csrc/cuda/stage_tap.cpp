// stage_tap on a GPU: check, guard, sizes, allocate, params, launch, check the launch, return. And how its work is cut.
#include <algorithm>

#include "stage_tap_host.h"

namespace interflow {
namespace {

constexpr const char* kTap = "stage_tap";
constexpr int64_t kVectorsAtOnce = 64;  // of channels, NHWC: 1 KB of a pixel
constexpr int64_t kSteps = 4;           // positions that a thread takes from a unit, 64 bytes each; twice as many where an image has
constexpr int64_t kManyParts = 32;      // more units than this
constexpr int64_t kPlaneSteps = 16;     // NCHW: from there on a plane is cut
constexpr int64_t kMostParts = 1024;

Divider divider(int64_t divisor) {
  uint32_t shift = 0;
  while (int64_t(1) << shift < divisor) ++shift;
  uint64_t one = 1;
  return {uint32_t(divisor), uint32_t(((one << 32) * ((one << shift) - uint64_t(divisor))) / uint64_t(divisor) + 1), shift};
}

int64_t ceil_of(int64_t n, int64_t by) { return (n + by - 1) / by; }

}  // namespace

TapPlan plan_tap_units(const TapShape& s, DType dtype, bool max_pool, const char* op) {
  STD_TORCH_CHECK(dtype != DType::F64, op, ": fp64 has no CUDA kernel; use backend('eager'), or fp32, bf16 or fp16");
  constexpr int64_t kMost = int64_t(1) << 30;
  STD_TORCH_CHECK(s.height <= kMost && s.width <= kMost && s.pixels() <= kMost, op, ": a map may have up to 2^30 pixels on a GPU, got H = ", s.height, " and W = ", s.width);
  TapPlan plan{s, dtype, max_pool};
  if (s.batch == 0 || s.channels == 0) return plan;
  plan.pixels = float(s.pixels()), plan.mean = float(1.0 / double(s.pixels()));
  int64_t vector = tap_vector(dtype, max_pool), positions, slab, images = 1, lanes, part_size;
  if (s.channels_last) {
    // Threads go to vectors of channels, then to positions, then to images
    int64_t vectors = ceil_of(s.channels, vector), columns = ceil_of(vectors, ceil_of(vectors, kVectorsAtOnce));
    positions = max_pool ? s.windows_h() * s.windows_w() : s.pixels();
    lanes = std::min(positions, kTapThreads / columns);
    images = std::max<int64_t>(1, kTapThreads / (columns * lanes));
    slab = columns * vector;
    int64_t step = lanes * (max_pool ? 1 : 4);
    part_size = step * std::clamp(positions / (step * kManyParts), kSteps, 2 * kSteps);
    plan.row = divider(max_pool ? s.windows_w() : s.width);
  } else {
    // As many threads for a plane as leave few of them idle
    int64_t row = ceil_of(s.width, vector);
    positions = max_pool ? s.windows_h() * row : ceil_of(s.pixels(), vector);
    for (lanes = kTapThreads; lanes > 1; lanes /= 2)
      if (positions >= 2 * lanes && positions * 8 >= ceil_of(positions, lanes) * lanes * 7) break;
    slab = kTapThreads / lanes;
    part_size = lanes == kTapThreads ? lanes * kPlaneSteps : positions;
    plan.row = divider(max_pool ? row : s.width);
  }
  int64_t parts = std::min(ceil_of(positions, part_size), kMostParts);
  part_size = ceil_of(positions, parts);
  parts = ceil_of(positions, part_size);
  if (parts > 1) images = 1;
  int64_t slabs = ceil_of(s.channels, slab), units = ceil_of(s.batch, images) * slabs * parts;
  STD_TORCH_CHECK(units < int64_t(1) << 31, op, ": too many maps for one launch, got B = ", s.batch, " and C = ", s.channels);
  plan.slab = int32_t(slab), plan.images = int32_t(images), plan.lanes = int32_t(lanes);
  plan.positions = int32_t(positions), plan.part_size = int32_t(part_size), plan.parts = int32_t(parts), plan.slabs = int32_t(slabs);
  plan.units = uint32_t(units);
  return plan;
}

namespace {

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
  bool meet = plan.parts > 1;
  Tensor partial = new_tensor(u, {meet ? s.batch * plan.parts * s.channels : 0}, ScalarType::Float);

  // Params
  TapParams P{};
  P.plan = plan;
  P.u = readable(u);
  P.stride_b = s.batch == 1 ? 0 : u.stride(0), P.stride_c = s.channels == 1 ? 0 : u.stride(1);
  P.stride_h = s.height == 1 ? 0 : u.stride(2), P.stride_w = s.width == 1 ? 1 : u.stride(3);
  int64_t size = element_size(dtype);
  if (s.channels_last) {
    P.access = widest_access(P.u, {P.stride_b * size, P.stride_h * size, P.stride_w * size, s.channels * size});
    if (P.access == 16 && s.channels % tap_vector(dtype, max_pool)) P.access = 8;
  } else {
    P.runs = P.stride_w == 1 && (s.height == 1 || P.stride_h == s.width);
    P.access = int32_t(size);
    if (max_pool && P.stride_w == 1) P.access = widest_access(P.u, {P.stride_b * size, P.stride_c * size, P.stride_h * size, s.width * size});
    if (!max_pool && P.runs) P.access = widest_access(P.u, {P.stride_b * size, P.stride_c * size, s.pixels() * size});
    if (P.access == 16 && (max_pool ? s.width : s.pixels()) % tap_vector(dtype, max_pool)) P.access = 8;
  }
  if (shift) {
    P.shift = readable(*shift), P.shift_dtype = dtype_of(*shift, kTap, "shift"), P.shift_stride = s.channels == 1 ? 1 : shift->stride(0);
    P.shift_wide = P.shift_stride == 1 && P.access == 16 && widest_access(P.shift, {}) == 16;
  }
  if (max_pool) {
    P.m = writable(m);
    P.m_access = widest_access(P.m, {(s.channels_last ? s.channels : s.width / 2) * size});
    if (P.m_access < (s.channels_last ? 16 : 8)) P.access = std::min(P.access, 8);  // never seen: allocators align
  }
  P.p = static_cast<float*>(writable(p));
  P.mask = need_mask ? static_cast<uint8_t*>(writable(mask)) : nullptr;
  if (meet) {
    P.partial = static_cast<float*>(writable(partial));
    P.arrivals = counters(guard.device(), guard.stream(), s.batch * plan.slabs);
  }
  P.stream = s.batch * s.channels * s.pixels() * size > l2_bytes() / 2;

  check_launch(launch_tap(P, guard.stream()), kTap, "the forward kernel");
  return {m, p, mask};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("stage_tap", TORCH_BOX(&interflow::stage_tap)); }
