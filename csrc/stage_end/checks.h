// The checks that stage_end's host sides make of their arguments, on every device.
#pragma once
#include "common/feature_map.h"
#include "stage_end/contract.h"

namespace interflow {

// Whether the activation is relu; nothing else but none is one.
inline bool is_relu(const std::string& activation) {
  INTERFLOW_CHECK(activation == "relu" || activation == "none", "stage_end: activation must be 'relu' or 'none', got '", activation.substr(0, 40), "'");
  return activation == "relu";
}

// t [B, C, H, W] in the dtype and on the device of u.
inline void check_beside(const Tensor& t, const MapShape& shape, const Tensor& u, const Place& place, const char* op, const char* name) {
  check_shape(t, {shape.batch, shape.channels, shape.height, shape.width}, op, name);
  INTERFLOW_CHECK(t.scalar_type() == u.scalar_type(), op, ": ", name, " must have the dtype of u, ", torch::headeronly::toString(u.scalar_type()), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  INTERFLOW_CHECK(place.same(t, u), op, ": ", name, " must be on ", place.name, ", as u is");
}

// -> sizes of u and its memory's order.
inline MapShape check_end(const Tensor& u, const OptionalTensor& shift, const OptionalTensor& residual, const Place& place) {
  MapShape shape = check_map(u, shift, place, "stage_end");
  if (residual) check_beside(*residual, shape, u, place, "stage_end", "residual");
  return shape;
}

inline MapShape check_end_backward(const OptionalTensor& dv, const OptionalTensor& dp, const OptionalTensor& v, const Tensor& like, bool channels_last, const Place& place) {
  constexpr const char* kOp = "stage_end_backward";
  MapShape shape = check_like(like, channels_last, kOp);
  if (dv) check_beside(*dv, shape, like, place, kOp, "dv");
  if (v) check_beside(*v, shape, like, place, kOp, "v");
  if (dp) check_mean_gradient(*dp, shape, dtype_of(like, kOp, "like"), like, place, kOp);
  return shape;
}

}  // namespace interflow
