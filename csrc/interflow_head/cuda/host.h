// What forward and backward of the head share on the CUDA host side.
#pragma once
#include "interflow_head/checks.h"
#include "common/cuda/host.h"
#include "interflow_head/cuda/kernels.h"

namespace interflow {

constexpr const char* kNoDoubles = ": fp64 has no CUDA kernel; call InterflowHead, interflow_kernels.interflow_head or backend('eager'), which take PyTorch's own operators";

// A small tensor as kernels take it, contiguous; `held` keeps a copy alive where one was made.
inline Parameter parameter_of(const OptionalTensor& t, const Tensor& like, const char* op, const char* name, std::vector<Tensor>& held) {
  if (!t) return {nullptr, DType::F32};
  DType dtype = dtype_of(*t, op, name);
  INTERFLOW_CHECK(dtype != DType::F64, op, kNoDoubles, ", got ", name, " in fp64");
  INTERFLOW_CHECK(on_device(*t) && t->get_device_index() == like.get_device_index(), op, ": ", name, " must be on the device of weight");
  held.push_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));
  return {readable(held.back()), dtype};
}

// Features as the maps of a launch, checked; `like`, called `where`, says on which device. Appends each stage's end to `begin`; the bytes of all maps.
inline int64_t head_maps(Stage* maps, const std::vector<Tensor>& features, const std::vector<int64_t>& pool_size, const Tensor& like, const char* where, std::vector<int64_t>& begin,
                         const char* op) {
  int64_t batch = features[0].dim() > 0 ? features[0].size(0) : 0, width = 0, bytes = 0;
  for (int64_t i = 0; i < int64_t(features.size()); ++i) {
    const Tensor& x = features[size_t(i)];
    Stage& s = maps[i] = stage_of(x, i, pool_size[0], pool_size[1], op);
    INTERFLOW_CHECK(s.dtype != DType::F64, op, kNoDoubles, ", got features[", i, "] in fp64");
    INTERFLOW_CHECK(x.size(0) == batch, op, ": features[", i, "] must have the batch of features[0], ", batch, ", got ", shape_text(x));
    INTERFLOW_CHECK(on_device(x) && x.get_device_index() == like.get_device_index(), op, ": features[", i, "] must be on the device of ", where);
    s.column = width;
    add_width(s, width, op);
    begin.push_back(width);
    bytes += batch * s.channels * s.height * s.width * element_size(s.dtype);
  }
  return bytes;
}

// Where each stage's parts lie in P.partial; its floats.
inline int64_t place_parts(HeadForward& P) {
  for (int i = 0; i < P.schedule.count; ++i) {
    P.partial_begin[i] = P.partial_group;
    const StageSchedule& s = P.schedule.stages[i];
    P.partial_group += int64_t(s.reductions(P.schedule.group_images)) * s.parts * s.width();
    P.partial_group = ceil_div(P.partial_group, 4) * 4;
  }
  return P.partial_group * P.schedule.groups;
}

// Shapes, weight and attention of both directions. `begin` [n + 1]: columns of the stages; pooled contiguous.
inline HeadTail head_tail(int64_t batch, const std::vector<int64_t>& begin, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& attention_weight,
                          const OptionalTensor& attention_bias, Attention mode, const char* op, std::vector<Tensor>& held) {
  HeadTail T{};
  T.count = int(begin.size()) - 1, T.batch = batch, T.width = begin.back(), T.classes = weight.size(0);
  std::copy(begin.begin(), begin.end(), T.begin);
  INTERFLOW_CHECK(T.width < INT32_MAX / 2, op, ": weight must have fewer than 2^30 columns, got ", T.width);
  for (int i = 0; i < T.count; ++i) T.first_block[i + 1] = T.first_block[i] + int(ceil_div(T.begin[i + 1] - T.begin[i], kBlockColumns));
  T.weight_dtype = dtype_of(weight, op, "weight");
  T.weight = parameter_of(weight, weight, op, "weight", held).data;
  T.mode = mode;
  T.bias = parameter_of(bias, weight, op, "bias", held);
  T.attention_weight = parameter_of(attention_weight, weight, op, "attention_weight", held);
  T.attention_bias = parameter_of(attention_bias, weight, op, "attention_bias", held);
  return T;
}

// pooled [B, D], and whether it and the weight can be read 16 bytes at a time in every stage.
inline void set_pooled(HeadTail& T, const float* pooled) {
  int64_t each = 16 / element_size(T.weight_dtype);
  T.pooled = pooled;
  T.vectors = reinterpret_cast<uintptr_t>(T.weight) % 16 == 0 && reinterpret_cast<uintptr_t>(pooled) % 16 == 0;
  for (int i = 0; i <= T.count; ++i) T.vectors = T.vectors && T.begin[i] % each == 0;
}

}  // namespace interflow
