// The checks that stage_tap's host sides make of their arguments, on every device.
#pragma once
#include "common/host.h"
#include "stage_tap/contract.h"

namespace interflow {

// A kind of device: whether a tensor lies there, and what it is called.
struct TapPlace {
  bool (*has)(const Tensor&);
  const char* name;
  bool same(const Tensor& a, const Tensor& b) const { return has(a) && a.get_device_index() == b.get_device_index(); }
};

// Whether u is taken as NHWC, and m and du come in channels_last: the channels of a pixel lie together, and the strides of C, W, H, B grow
// in this order. A dimension of size 1 does not count; an image may be repeated (stride 0). All else comes contiguous, whose kernels take
// any strides. interflow_kernels/_tap_format.py has the same rule.
inline bool runs_along_channels(const Tensor& u) {
  if (u.stride(1) != 1 || u.size(1) <= 1) return false;
  int64_t last = 1;
  for (int64_t d : {3, 2}) {
    if (u.size(d) == 1) continue;
    if (u.stride(d) <= last) return false;
    last = u.stride(d);
  }
  return u.stride(0) > last || u.stride(0) == 0 || u.size(0) == 1;
}

// -> sizes of u and its memory's order.
inline TapShape check_tap(const Tensor& u, const OptionalTensor& shift, const TapPlace& place) {
  constexpr const char* kOp = "stage_tap";
  check_defined(u, kOp, "u");
  INTERFLOW_CHECK(u.dim() == 4 && u.size(2) > 0 && u.size(3) > 0, kOp, ": u must be [B, C, H, W] with H and W of at least 1, got ", shape_text(u));
  (void)dtype_of(u, kOp, "u");
  if (shift) {
    check_shape(*shift, {u.size(1)}, kOp, "shift");
    INTERFLOW_CHECK(shift->scalar_type() == u.scalar_type() || shift->scalar_type() == ScalarType::Float, kOp, ": shift must have the dtype of u, ",
                    torch::headeronly::toString(u.scalar_type()), ", or be fp32, got ", torch::headeronly::toString(shift->scalar_type()));
    INTERFLOW_CHECK(place.same(*shift, u), kOp, ": shift must be on ", place.name, ", as u is");
  }
  return {u.size(0), u.size(1), u.size(2), u.size(3), runs_along_channels(u)};
}

inline TapShape check_tap_backward(const OptionalTensor& dm, const OptionalTensor& dp, const Tensor& mask, const Tensor& like, bool max_pool, bool channels_last,
                                   const TapPlace& place) {
  constexpr const char* kOp = "stage_tap_backward";
  check_defined(like, kOp, "like");
  check_defined(mask, kOp, "mask");
  INTERFLOW_CHECK(like.dim() == 4 && like.size(2) > 0 && like.size(3) > 0, kOp, ": like must be of u's shape [B, C, H, W], got ", shape_text(like));
  DType dtype = dtype_of(like, kOp, "like");
  TapShape shape{like.size(0), like.size(1), like.size(2), like.size(3), channels_last};
  ScalarType acc_type = dtype == DType::F64 ? ScalarType::Double : ScalarType::Float;
  INTERFLOW_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && place.has(mask), kOp, ": mask must be contiguous bytes on ", place.name,
                  ", as stage_tap returned it");
  check_shape(mask, {shape.batch * shape.mask_bytes(max_pool)}, kOp, "mask");
  INTERFLOW_CHECK(!dm || max_pool, kOp, ": dm must be None where max_pool is False, which has no m");
  if (dm) {
    check_shape(*dm, {shape.batch, shape.channels, shape.height / 2, shape.width / 2}, kOp, "dm");
    INTERFLOW_CHECK(dm->scalar_type() == like.scalar_type() && place.same(*dm, mask), kOp, ": dm must have u's dtype and device, got ",
                    torch::headeronly::toString(dm->scalar_type()));
  }
  if (dp) {
    check_shape(*dp, {shape.batch, shape.channels}, kOp, "dp");
    INTERFLOW_CHECK(dp->scalar_type() == acc_type && place.same(*dp, mask), kOp, ": dp must have p's dtype and device, got ",
                    torch::headeronly::toString(dp->scalar_type()));
  }
  return shape;
}

}  // namespace interflow
