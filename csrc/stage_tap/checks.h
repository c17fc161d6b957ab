// The checks that stage_tap's host sides make of their arguments, on every device.
#pragma once
#include "common/feature_map.h"
#include "stage_tap/contract.h"

namespace interflow {

// -> sizes of u and its memory's order.
inline TapShape check_tap(const Tensor& u, const OptionalTensor& shift, const Place& place) { return {check_map(u, shift, place, "stage_tap")}; }

inline TapShape check_tap_backward(const OptionalTensor& dm, const OptionalTensor& dp, const Tensor& mask, const Tensor& like, bool max_pool, bool channels_last,
                                   const Place& place) {
  constexpr const char* kOp = "stage_tap_backward";
  TapShape shape{check_like(like, channels_last, kOp)};
  check_defined(mask, kOp, "mask");
  INTERFLOW_CHECK(mask.scalar_type() == ScalarType::Byte && mask.is_contiguous() && place.has(mask), kOp, ": mask must be contiguous bytes on ", place.name,
                  ", as stage_tap returned it");
  check_shape(mask, {shape.batch * shape.mask_bytes(max_pool)}, kOp, "mask");
  INTERFLOW_CHECK(!dm || max_pool, kOp, ": dm must be None where max_pool is False, which has no m");
  if (dm) {
    check_shape(*dm, {shape.batch, shape.channels, shape.height / 2, shape.width / 2}, kOp, "dm");
    INTERFLOW_CHECK(dm->scalar_type() == like.scalar_type() && place.same(*dm, mask), kOp, ": dm must have u's dtype and device, got ",
                    torch::headeronly::toString(dm->scalar_type()));
  }
  if (dp) check_mean_gradient(*dp, shape, dtype_of(like, kOp, "like"), mask, place, kOp);
  return shape;
}

}  // namespace interflow
