// What every implementation of the head asks of its arguments, with the same sentences: each names the argument, what was expected and what came.
#pragma once
#include "common/host.h"
#include "interflow_head/contract.h"

namespace interflow {

constexpr const char* kHead = "interflow_head";
constexpr const char* kPool = "interflow_pool";

inline Attention attention_of(const std::string& name) {
  if (name == "hard") return Attention::Hard;
  if (name == "1xn") return Attention::OneByN;
  if (name == "nxn") return Attention::NByN;
  if (name == "classwise") return Attention::Classwise;
  if (name == "gated") return Attention::Gated;
  if (name == "folded") return Attention::Folded;
  fail(kHead, ": attention must be one of hard, 1xn, nxn, classwise, gated, folded, got '", name.substr(0, 40), "'");
}

// Attention parameters in the shapes of the mode.
inline void check_attention(Attention mode, const OptionalTensor& weight, const OptionalTensor& bias, int64_t n, int64_t k) {
  std::vector<int64_t> weight_shape{n}, bias_shape{1};
  if (mode == Attention::NByN || mode == Attention::Gated) weight_shape = {n, n}, bias_shape = {n};
  if (mode == Attention::Classwise) weight_shape = {n, k}, bias_shape = {k};
  if (mode == Attention::Folded) bias_shape = {k};
  INTERFLOW_CHECK(weight.has_value() == (mode != Attention::Folded), kHead, ": attention_weight must be ",
                  mode == Attention::Folded ? "None for attention 'folded'" : "a tensor for every attention but 'folded'");
  if (weight) check_shape(*weight, weight_shape, kHead, "attention_weight");
  INTERFLOW_CHECK(bias.has_value() || mode != Attention::Gated, kHead, ": attention_bias must be a tensor for attention 'gated'");
  INTERFLOW_CHECK(!bias.has_value() || mode != Attention::Hard, kHead, ": attention_bias must be None for attention 'hard'");
  if (bias) check_shape(*bias, bias_shape, kHead, "attention_bias");
}

// weight [K, D], bias [n, K] for n stages of D pooled values in all.
inline void check_parameters(const Tensor& weight, const OptionalTensor& bias, int64_t n, int64_t width) {
  INTERFLOW_CHECK(weight.dim() == 2 && weight.size(0) > 0, kHead, ": weight must be [K, D] with K of at least 1, got ", shape_text(weight));
  INTERFLOW_CHECK(weight.size(1) == width, kHead, ": weight must have D = ", width, " columns, the sum of the features' pooled values, got ", shape_text(weight));
  if (bias) check_shape(*bias, {n, weight.size(0)}, kHead, "bias");
}

// Feature i as a stage, its column not yet known.
inline Stage stage_of(const Tensor& x, int64_t i, int64_t bins_h, int64_t bins_w, const char* op = kHead) {
  std::string name = "features[" + std::to_string(i) + "]";
  int64_t rank = x.dim();
  INTERFLOW_CHECK(rank == 4 || rank == 2, op, ": ", name, " must be [B, C, H, W] or, already pooled, [B, D_i], got ", shape_text(x));
  auto size = x.sizes();
  auto stride = x.strides();
  Stage s{x.const_data_ptr(), dtype_of(x, op, name), size[1], 1, 1, stride[0], stride[1], 1, 1, 1, 1, 0};
  if (rank == 2) return s;
  INTERFLOW_CHECK(size[2] > 0 && size[3] > 0, op, ": ", name, " must have H and W of at least 1, got ", shape_text(x));
  s.height = size[2], s.width = size[3], s.stride_h = stride[2], s.stride_w = stride[3];
  s.bins_h = bins_h, s.bins_w = bins_w;
  return s;
}

// Adds the stage's pooled width to `width`, or raises where that would overflow.
inline void add_width(const Stage& s, int64_t& width, const char* op = kHead) {
  int64_t bins, own;
  INTERFLOW_CHECK(!__builtin_mul_overflow(s.bins_h, s.bins_w, &bins) && !__builtin_mul_overflow(s.channels, bins, &own) && !__builtin_add_overflow(width, own, &width), op,
                  ": pool_size must give fewer than 2^63 pooled values, got ", s.bins_h, " x ", s.bins_w, " for ", s.channels, " channels");
}

// Stages and pool_size of a call.
inline void check_call(const std::vector<Tensor>& features, const std::vector<int64_t>& pool_size, const char* op = kHead) {
  INTERFLOW_CHECK(!features.empty() && features.size() <= kMaxStages, op, ": features must name 1 to ", kMaxStages, " stages, got ", features.size());
  INTERFLOW_CHECK(pool_size.size() == 2 && pool_size[0] > 0 && pool_size[1] > 0, op, ": pool_size must be two numbers of at least 1, got ", shape_text(pool_size));
}

// All of a backward call but the attention; returns the columns of the stages, [n + 1].
inline std::vector<int64_t> check_backward(const char* op, const OptionalTensor& dy, const OptionalTensor& dbranches, const Tensor& pooled, const Tensor& weight, const OptionalTensor& bias,
                                           const std::vector<int64_t>& widths, const std::vector<int64_t>& feature_stages, ScalarType acc_type) {
  INTERFLOW_CHECK(!widths.empty() && widths.size() <= kMaxStages, op, ": widths must name 1 to ", kMaxStages, " stages, got ", widths.size());
  int64_t n = int64_t(widths.size()), width = 0;
  std::vector<int64_t> begin{0};
  for (int64_t w : widths) {
    INTERFLOW_CHECK(w >= 0 && !__builtin_add_overflow(width, w, &width), op, ": widths must be at least 0 and add up to fewer than 2^63, got ", w);
    begin.push_back(width);
  }
  check_parameters(weight, bias, n, width);
  check_defined(pooled, op, "pooled");
  INTERFLOW_CHECK(pooled.dim() == 2 && pooled.size(1) == width && pooled.scalar_type() == acc_type, op, ": pooled must be [B, ", width, "] in ",
                  torch::headeronly::toString(acc_type), ", as interflow_head returned it, got ", shape_text(pooled), " in ", torch::headeronly::toString(pooled.scalar_type()));
  if (dy) check_shape(*dy, {pooled.size(0), weight.size(0)}, op, "dy");
  if (dbranches) check_shape(*dbranches, {pooled.size(0), n, weight.size(0)}, op, "dbranches");
  uint32_t seen = 0;
  for (int64_t i : feature_stages) {
    INTERFLOW_CHECK(i >= 0 && i < n && !(seen >> i & 1), op, ": feature_stages must be different ones of 0 to ", n - 1, ", got ", shape_text(feature_stages));
    seen |= 1u << i;
  }
  return begin;
}

}  // namespace interflow
