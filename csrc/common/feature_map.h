// Feature maps as the operators at a stage's end take them: the memory format they run in, and what a raw call could get wrong.
#pragma once
#include "common/host.h"
#include "common/map_shape.h"

namespace interflow {

// A kind of device: whether a tensor lies there, and what it is called.
struct Place {
  bool (*has)(const Tensor&);
  const char* name;
  bool same(const Tensor& a, const Tensor& b) const { return has(a) && a.get_device_index() == b.get_device_index(); }
};

// Whether u is taken as NHWC, and what comes of its size in channels_last: the channels of a pixel lie together, and the strides of C, W, H, B grow
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

// u [B, C, H, W] and shift [C] or none -> sizes of u and its memory's order.
inline MapShape check_map(const Tensor& u, const OptionalTensor& shift, const Place& place, const char* op) {
  check_defined(u, op, "u");
  INTERFLOW_CHECK(u.dim() == 4 && u.size(2) > 0 && u.size(3) > 0, op, ": u must be [B, C, H, W] with H and W of at least 1, got ", shape_text(u));
  (void)dtype_of(u, op, "u");
  if (shift) {
    check_shape(*shift, {u.size(1)}, op, "shift");
    INTERFLOW_CHECK(shift->scalar_type() == u.scalar_type() || shift->scalar_type() == ScalarType::Float, op, ": shift must have the dtype of u, ",
                    torch::headeronly::toString(u.scalar_type()), ", or be fp32, got ", torch::headeronly::toString(shift->scalar_type()));
    INTERFLOW_CHECK(place.same(*shift, u), op, ": shift must be on ", place.name, ", as u is");
  }
  return {u.size(0), u.size(1), u.size(2), u.size(3), runs_along_channels(u)};
}

// Sums' type beside maps of this dtype.
inline ScalarType accumulation_type(DType dtype) { return dtype == DType::F64 ? ScalarType::Double : ScalarType::Float; }

// like, of u's shape and dtype.
inline MapShape check_like(const Tensor& like, bool channels_last, const char* op) {
  check_defined(like, op, "like");
  INTERFLOW_CHECK(like.dim() == 4 && like.size(2) > 0 && like.size(3) > 0, op, ": like must be of u's shape [B, C, H, W], got ", shape_text(like));
  (void)dtype_of(like, op, "like");
  return {like.size(0), like.size(1), like.size(2), like.size(3), channels_last};
}

// dp [B, C], beside maps of this dtype on the device of `beside`.
inline void check_mean_gradient(const Tensor& dp, const MapShape& shape, DType dtype, const Tensor& beside, const Place& place, const char* op) {
  check_shape(dp, {shape.batch, shape.channels}, op, "dp");
  INTERFLOW_CHECK(dp.scalar_type() == accumulation_type(dtype) && place.same(dp, beside), op, ": dp must have p's dtype and device, got ",
                  torch::headeronly::toString(dp.scalar_type()));
}

}  // namespace interflow
