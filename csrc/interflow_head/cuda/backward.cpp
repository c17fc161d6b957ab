// interflow_head_backward on a GPU: check, guard, allocate, params, up to three launches, return.
#include "interflow_head/cuda/host.h"

namespace interflow {
namespace {

constexpr const char* kBackward = "interflow_head_backward";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interflow_head_backward(const OptionalTensor& dy, const OptionalTensor& dbranches, const Tensor& pooled, const Tensor& weight,
                                                                           const OptionalTensor& bias, const OptionalTensor& attention_weight,
                                                                           const OptionalTensor& attention_bias, const std::string& attention,
                                                                           const std::vector<int64_t>& widths, const std::vector<int64_t>& feature_stages, bool need_weight,
                                                                           bool need_bias, bool need_attention) {
  // Check
  Attention mode = attention_of(attention);
  int64_t n = int64_t(widths.size());
  std::vector<int64_t> begin = check_backward(kBackward, dy, dbranches, pooled, weight, bias, widths, feature_stages, ScalarType::Float);
  check_attention(mode, attention_weight, attention_bias, n, weight.size(0));
  INTERFLOW_CHECK(on_device(pooled) && pooled.get_device_index() == weight.get_device_index(), kBackward, ": pooled must be on the device of weight");

  // Guard and allocate
  OnDevice on(weight);
  std::vector<Tensor> held;
  int64_t batch = pooled.size(0);
  HeadBackward P{};
  P.tail = head_tail(batch, begin, weight, bias, attention_weight, attention_bias, mode, kBackward, held);
  const HeadTail& T = P.tail;
  P.dy = parameter_of(dy, weight, kBackward, "dy", held);
  P.dbranches = parameter_of(dbranches, weight, kBackward, "dbranches", held);
  auto output = [&](bool needed, const Tensor& like, ScalarType type) {
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    return new_tensor(weight, needed ? shape : std::vector<int64_t>{0}, type);
  };
  auto parameter_output = [&](bool needed, const OptionalTensor& like) {
    return output(needed && like, like ? *like : weight, like ? like->scalar_type() : ScalarType::Float);
  };
  Tensor dpooled = output(!feature_stages.empty(), pooled, ScalarType::Float);
  Tensor dweight = output(need_weight, weight, weight.scalar_type());
  Tensor dbias = parameter_output(need_bias, bias);
  Tensor dattention_weight = parameter_output(need_attention, attention_weight), dattention_bias = parameter_output(need_attention, attention_bias);

  // Nothing to sum: zeros
  auto zero = [](std::initializer_list<Tensor*> tensors) {
    for (Tensor* t : tensors) {
      writable(*t);
      torch::stable::zero_(*t);
    }
  };
  if (batch == 0 || (!dy && !dbranches)) {
    zero({&dpooled, &dweight, &dbias, &dattention_weight, &dattention_bias});
    return {dpooled, dweight, dbias, dattention_weight, dattention_bias};
  }
  if (!dy) zero({&dattention_weight, &dattention_bias});

  // Params
  auto floats = [&](int64_t count) {
    held.push_back(new_tensor(weight, {count}, ScalarType::Float));
    return static_cast<float*>(writable(held.back()));
  };
  auto data = [](bool needed, const Tensor& t) { return needed ? writable(t) : nullptr; };
  held.push_back(pooled.is_contiguous() ? pooled : torch::stable::contiguous(pooled));
  set_pooled(P.tail, static_cast<const float*>(readable(held.back())));
  bool gated = mode == Attention::Gated, attention_terms = dy && need_attention && attention_weight;
  P.dpooled = static_cast<float*>(data(!feature_stages.empty(), dpooled));
  for (int64_t i : feature_stages) P.stages[i] = true;
  P.dweight = data(need_weight, dweight);
  P.dbias = data(need_bias && bias, dbias);
  P.dattention_weight = data(attention_terms, dattention_weight);
  P.dattention_bias = data(dy && need_attention && attention_bias, dattention_bias);
  INTERFLOW_CHECK(std::max({batch, T.width, T.classes}) < INT32_MAX / 2 && score_tiles(T) + ceil_div(batch, kProductImages) * (T.width / kProductColumns + n) + ceil_div(T.classes, kWeightClasses) * (T.width / kWeightColumns + n) < INT32_MAX,
                  kBackward, ": pooled must be smaller: 2^31 tiles of work are beyond the kernel, got ", shape_text(pooled));
  column_tiles(P.pooled_tiles, T, kProductColumns);
  column_tiles(P.weight_tiles, T, kWeightColumns);

  // Launch
  if (dy && (gated || (attention_terms && dbranches))) {
    if (gated) {
      P.dscores = floats(batch * n * T.classes);
      P.gate_terms = floats(score_tiles(T) * (n * n + n));
    } else {
      P.score_terms = floats(ceil_div(batch, kTileImages) * n * T.classes);
    }
    check_launch(launch_head_scores(P, on.stream()), kBackward, "interflow_head_scores_kernel");
  }
  if (attention_terms && !gated && !dbranches) P.product_terms = floats(P.weight_tiles[n] * T.classes);
  if (P.dpooled || P.dweight || P.product_terms) check_launch(launch_head_products(P, on.stream()), kBackward, "interflow_head_products_kernel");
  if (P.dbias || P.dattention_weight || P.dattention_bias) {
    P.epilogue_terms = floats(epilogue_terms(T) * epilogue_shares(T));
    P.counters = counters(on.device(), on.stream(), 1);
    check_launch(launch_head_epilogue(P, on.stream()), kBackward, "interflow_head_epilogue_kernel");
  }
  return {dpooled, dweight, dbias, dattention_weight, dattention_bias};
}

}  // namespace
}  // namespace interflow

INTERFLOW_REGISTER(m) { m.impl("interflow_head_backward", TORCH_BOX(&interflow::interflow_head_backward)); }
