// interflow_head and interflow_pool on the CPU: check, plan the pooling, allocate, run (one parallel region to pool, one to multiply), return.
#include "interflow_head/cpu/host.h"

namespace interflow {
namespace {

constexpr int64_t kUnitBytes = 64 << 10;
constexpr int64_t kUnitsAtOnce = 16;  // 1 MB of one map: 5 % faster than units taken singly

// --- planning --------------------------------------------------------------------------------------------------------
// With one bin a map whose rows follow each other is one row.
void flatten_rows(Stage& s) {
  if (s.bins_h * s.bins_w != 1 || s.height == 1) return;
  if (s.width == 1) s.stride_w = s.stride_h;
  if (s.width != 1 && s.stride_h != s.width * s.stride_w) return;
  s.width *= s.height;
  s.height = 1;
}

StagePlan plan_stage(Stage s, int64_t element) {
  flatten_rows(s);
  int64_t pixels = s.height * s.width, bins = s.bins_h * s.bins_w;
  StagePlan plan{s, Way::Strided, 0, 1, 0, -1, 0};
  if (s.channels > 1 && s.stride_c == 1)
    plan.way = Way::Pixels;
  else if (s.stride_w == 1 || s.width == 1)
    plan.way = Way::Planes;
  if (s.channels == 0) return plan;
  if (plan.way != Way::Pixels) {
    plan.part_size = std::max<int64_t>(1, kUnitBytes / (pixels * element));
    plan.parts = (s.channels + plan.part_size - 1) / plan.part_size;
  } else if (bins > 1) {
    plan.parts = bins;
  } else {
    plan.part_size = std::max<int64_t>(8, kUnitBytes / (s.channels * element) / 8 * 8);
    plan.parts = (pixels + plan.part_size - 1) / plan.part_size;
    if (plan.parts > 1) plan.partial = 0;
  }
  return plan;
}

struct Sizes {
  int64_t partial = 0, arrivals = 0, bytes = 0;
};

Sizes plan_pooling(PoolPlan& plan, const std::vector<Tensor>& features, int64_t bins_h, int64_t bins_w, const char* op = kHead) {
  Sizes sizes;
  plan.count = int(features.size());
  plan.batch = features[0].dim() > 0 ? features[0].size(0) : 0;
  plan.width = plan.units = 0;
  for (int i = 0; i < plan.count; ++i) {
    Stage s = stage_of(features[i], i, bins_h, bins_w, op);
    INTERFLOW_CHECK(features[i].size(0) == plan.batch, op, ": features[", i, "] must have the batch of features[0], ", plan.batch, ", got ", shape_text(features[i]));
    INTERFLOW_CHECK(features[i].is_cpu(), op, ": features[", i, "] must be on the CPU, as features[0] is");
    s.column = plan.width;
    add_width(s, plan.width, op);
    StagePlan& stage = plan.stages[i] = plan_stage(s, element_size(s.dtype));
    stage.first_unit = plan.units;
    plan.units += stage.parts * plan.batch;
    sizes.bytes += plan.batch * s.channels * s.height * s.width * element_size(s.dtype);
    if (stage.partial < 0) continue;
    stage.partial = sizes.partial;
    stage.arrival = sizes.arrivals;
    sizes.partial += plan.batch * stage.parts * s.channels;
    sizes.arrivals += plan.batch;
  }
  return sizes;
}

void run_pooling(const PoolPlan& plan, int64_t bytes) {
  const HeadKernels& kernels = head_kernels();
  parallel_tickets(plan.units, bytes > kSerialBytes, kUnitsAtOnce, [&](int64_t unit) {
    int i = plan.count - 1;
    while (plan.stages[i].first_unit > unit || plan.stages[i].parts == 0) --i;
    const StagePlan& stage = plan.stages[i];
    int64_t place = unit - stage.first_unit;
    kernels.pool_unit(plan, stage, place / stage.parts, place % stage.parts);
  });
}

// Pools what is planned into `pooled` [B, D].
template <class Acc>
void pool_into(Tensor& pooled, PoolPlan& plan, const Sizes& sizes) {
  std::unique_ptr<Acc[]> partial(sizes.partial ? new Acc[size_t(sizes.partial)] : nullptr);
  std::unique_ptr<std::atomic<int>[]> arrivals(sizes.arrivals ? new std::atomic<int>[size_t(sizes.arrivals)]() : nullptr);
  plan.pooled = pooled.mutable_data_ptr();
  plan.partial = partial.get();
  plan.arrivals = arrivals.get();
  run_pooling(plan, sizes.bytes);
}

// --- the operators ---------------------------------------------------------------------------------------------------
template <class Acc>
std::tuple<Tensor, Tensor, Tensor> run(const std::vector<Tensor>& features, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& attention_weight,
                                       const OptionalTensor& attention_bias, Attention mode, int64_t bins_h, int64_t bins_w, bool need_branches, ScalarType out_type) {
  // Check
  DType out_dtype = dtype_of(out_type, kHead, "dtype");
  PoolPlan plan;
  Sizes sizes = plan_pooling(plan, features, bins_h, bins_w);
  int64_t n = plan.count, batch = plan.batch;
  check_parameters(weight, bias, n, plan.width);
  constexpr bool wide = sizeof(Acc) == 8;
  for (int64_t i = 0; i < n; ++i)
    INTERFLOW_CHECK((plan.stages[i].map.dtype == DType::F64) == wide, kHead, ": features[", i, "] and weight must both be fp64 or neither, got ",
                    torch::headeronly::toString(features[i].scalar_type()), " and ", torch::headeronly::toString(weight.scalar_type()));
  int64_t classes = weight.size(0);
  AttentionValues<Acc> attention(mode, attention_weight, attention_bias, n, classes);
  Values<Acc> biases(bias, "bias");
  Tensor rows = contiguous(weight, kHead, "weight");

  // Allocate
  constexpr ScalarType acc_type = wide ? ScalarType::Double : ScalarType::Float;
  Tensor pooled = new_tensor(weight, {batch, plan.width}, acc_type);
  Tensor y = new_tensor(weight, {batch, classes}, out_type);
  Tensor branches = need_branches ? new_tensor(weight, {batch, n, classes}, out_type) : new_tensor(weight, {0}, out_type);
  if (batch == 0) return {y, branches, pooled};
  std::unique_ptr<Acc[]> scores(attention.gated() ? new Acc[size_t(batch * n * classes)] : nullptr);

  // Pool
  pool_into<Acc>(pooled, plan, sizes);

  // Multiply and aggregate
  Columns columns[kMaxStages];
  for (int64_t i = 0; i < n; ++i) columns[i] = {plan.stages[i].map.column, i + 1 < n ? plan.stages[i + 1].map.column : plan.width};
  ProductParams<Acc> P{};
  P.batch = batch, P.width = plan.width, P.classes = classes, P.count = int(n), P.columns = columns;
  P.pooled = static_cast<const Acc*>(pooled.const_data_ptr());
  P.weight = rows.const_data_ptr(), P.weight_dtype = dtype_of(weight, kHead, "weight");
  P.bias = biases.data(), P.a = attention.a, P.mixing = attention.mixing(), P.c = attention.c, P.c_klass = attention.c_klass;
  if (attention.gated()) P.gate_matrix = attention.weight.data(), P.gate_offset = attention.bias.data(), P.c = nullptr;
  P.scores = scores.get();
  P.branches = need_branches ? branches.mutable_data_ptr() : nullptr;
  P.y = y.mutable_data_ptr(), P.out_dtype = out_dtype;
  run_product(P);
  return {y, branches, pooled};
}

std::tuple<Tensor, Tensor, Tensor> interflow_head(const std::vector<Tensor>& features, const Tensor& weight, const OptionalTensor& bias,
                                                  const OptionalTensor& attention_weight, const OptionalTensor& attention_bias, const std::string& attention,
                                                  const std::vector<int64_t>& pool_size, bool need_branches, std::optional<ScalarType> dtype) {
  check_call(features, pool_size);
  auto call = dtype_of(weight, kHead, "weight") == DType::F64 ? run<double> : run<float>;
  return within_memory(kHead, [&] {
    return call(features, weight, bias, attention_weight, attention_bias, attention_of(attention), pool_size[0], pool_size[1], need_branches,
                dtype.value_or(weight.scalar_type()));
  });
}

// The first half alone.
Tensor interflow_pool(const std::vector<Tensor>& features, const std::vector<int64_t>& pool_size) {
  check_call(features, pool_size, kPool);
  bool wide = dtype_of(features[0], kPool, "features[0]") == DType::F64;
  PoolPlan plan;
  Sizes sizes = plan_pooling(plan, features, pool_size[0], pool_size[1], kPool);
  for (int i = 0; i < plan.count; ++i)
    INTERFLOW_CHECK((plan.stages[i].map.dtype == DType::F64) == wide, kPool, ": features must all be fp64 or none, got features[", i, "] in ",
                    torch::headeronly::toString(features[i].scalar_type()), " beside ", torch::headeronly::toString(features[0].scalar_type()));
  return within_memory(kPool, [&] {
    Tensor pooled = new_tensor(features[0], {plan.batch, plan.width}, wide ? ScalarType::Double : ScalarType::Float);
    if (plan.batch > 0) wide ? pool_into<double>(pooled, plan, sizes) : pool_into<float>(pooled, plan, sizes);
    return pooled;
  });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) {
  m.impl("interflow_head", TORCH_BOX(&interflow::interflow_head));
  m.impl("interflow_pool", TORCH_BOX(&interflow::interflow_pool));
}
