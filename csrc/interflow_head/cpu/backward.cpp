// interflow_head_backward on the CPU: gradients of pooled features, weight, bias and attention from pooled [B, D].
//
// dscores [B, n, K] is the gradient of Z: A[i,k] dy[b,k] + dZ[b,i,k], or the gate's. Then
//   dp_i[b,:] = sum_k dscores[b,i,k] W_i[k,:]        dW_i[k,:] = sum_b dscores[b,i,k] p_i[b,:]        db[i,k] = sum_b dscores[b,i,k]
//   dA[i,k]   = sum_b dy[b,k] Z[b,i,k]               from which the attention's parameters take their sums.
// Without dZ a linear mode needs no Z for dA: with G = dy^T p, dW_i = A_i G_i and dA[i,k] = W_i[k,:] . G_i[k,:] + b_i[k] sum_b dy[b,k],
// so Z is neither saved nor recomputed. Every sum has one fixed order and two levels.
//
// A gradient is finite where that of the definition is, and only there. A factor taken out of a sum could hide or add an infinity, so with
// an infinite or NaN A the gradients come from dscores and Z, and so does dA where the products give anything that is not finite.
#include "common/cpu/column_sums.h"
#include "interflow_head/cpu/host.h"

namespace interflow {
namespace {

constexpr const char* kBackward = "interflow_head_backward";

template <class Acc>
using Buffer = std::unique_ptr<Acc[]>;

// No branch in the loop, so that it is compiled to vectors.
template <class Acc>
bool all_finite(const Acc* values, int64_t n) {
  int not_finite = 0;
  for (int64_t i = 0; i < n; ++i) not_finite |= values[i] - values[i] != 0;
  return !not_finite;
}

// out = factor * in. Whether all of it is finite.
template <class Acc>
bool multiply(Acc* __restrict out, const Acc* __restrict in, Acc factor, int64_t n) {
  int not_finite = 0;
  for (int64_t i = 0; i < n; ++i) {
    Acc x = factor * in[i];
    out[i] = x;
    not_finite |= x - x != 0;
  }
  return !not_finite;
}

template <class Acc>
struct Backward {
  int64_t n, batch, width, classes;
  Columns columns[kMaxStages];
  const AttentionValues<Acc>& attention;
  const Acc* bias;       // [n, K] or null
  const Acc* pooled;     // [B, D]
  const void* weight;    // [K, D]
  DType weight_dtype;
  const Acc* dy;         // [B, K] or null
  const Acc* dbranches;  // [B, n, K] or null
  Buffer<Acc> scores;    // [B, n, K] where needed
  Buffer<Acc> own_dscores;
  const Acc* dscores = nullptr;           // [B, n, K]
  Buffer<Acc> gate_dmatrix, gate_doffset; // [B, n, n], [B, n]: one for each image
  bool from_products = false;             // G = dy^T p gives dW and dA

  void recompute_scores();
  void compute_dscores();
  void mix_again(Acc* out, const Acc* in, int64_t i) const;
  void pooled_gradient(Acc* dpooled, const std::vector<int64_t>& stages) const;
  void weight_gradient(void* dweight, double* da) const;
  void bias_gradient(Acc* dbias) const;
  ColumnSums<Acc> dy_sum() const;
  void da_from_scores(double* da) const;
  void attention_gradient(Acc* dweight, Acc* dbias, const double* da) const;
};

template <class Acc>
void Backward<Acc>::recompute_scores() {
  scores.reset(new Acc[size_t(batch * n * classes)]);
  ProductParams<Acc> P{};
  P.batch = batch, P.width = width, P.classes = classes, P.count = int(n), P.columns = columns;
  P.pooled = pooled, P.weight = weight, P.weight_dtype = weight_dtype, P.bias = bias;
  P.scores = scores.get();
  run_product(P);
}

// out[k] = sum_j M_ji in[k] where it is not finite: term by term, as the definition does.
template <class Acc>
void Backward<Acc>::mix_again(Acc* out, const Acc* in, int64_t i) const {
  const Acc* m = attention.mixing();
  for (int64_t k = 0; k < classes; ++k) {
    if (out[k] - out[k] == 0) continue;
    out[k] = 0;
    for (int64_t j = 0; j < n; ++j) out[k] += m[j * n + i] * in[k];
  }
}

template <class Acc>
void Backward<Acc>::compute_dscores() {
  if (!dy) {
    dscores = dbranches;
    return;
  }
  own_dscores.reset(new Acc[size_t(batch * n * classes)]);
  dscores = own_dscores.get();
  bool worthwhile = batch * n * classes > kSerialProducts;
  if (attention.gated()) {
    gate_dmatrix.reset(new Acc[size_t(batch * n * n)]);
    gate_doffset.reset(new Acc[size_t(batch * n)]);
    GateBackwardParams<Acc> P{batch, classes, int(n), scores.get(), dy, dbranches, attention.weight.data(), attention.bias.data(),
                              own_dscores.get(), gate_dmatrix.get(), gate_doffset.get()};
    const auto& kernels = head_kernels().typed<Acc>();
    parallel_tickets(batch, worthwhile, 1, [&](int64_t b) { kernels.gate_backward(P, b); });
    return;
  }
  const Aggregation<Acc>& a = attention.a;
  parallel_tickets(batch, worthwhile, 1, [&](int64_t b) {
    for (int64_t i = 0; i < n; ++i) {
      Acc* out = own_dscores.get() + (b * n + i) * classes;
      const Acc* in = dy + b * classes;
      if (!a.a)
        std::copy(in, in + classes, out);
      else if (a.klass == 0) {
        bool finite = multiply(out, in, a.a[i * a.stage], classes);
        if (!finite && attention.mixing()) mix_again(out, in, i);  // the sum of M's column overflowed, or holds an infinity
      } else
        for (int64_t k = 0; k < classes; ++k) out[k] = a.a[i * a.stage + k] * in[k];
      if (dbranches)
        for (int64_t k = 0; k < classes; ++k) out[k] += dbranches[(b * n + i) * classes + k];
    }
  });
}

template <class Acc>
void Backward<Acc>::pooled_gradient(Acc* dpooled, const std::vector<int64_t>& stages) const {
  constexpr int64_t block = 64, images = 64;
  struct Task {
    int stage;
    int64_t d0, d1;
  };
  std::vector<Task> tasks;
  for (int64_t i : stages)
    for (int64_t d = columns[i].begin; d < columns[i].end; d += block) tasks.push_back({int(i), d, std::min(d + block, columns[i].end)});
  if (int64_t(stages.size()) < n) std::fill(dpooled, dpooled + batch * width, Acc(0));
  PooledGradientParams<Acc> P{batch, width, classes, int(n), dscores, weight, weight_dtype, dpooled};
  int64_t image_blocks = (batch + images - 1) / images;
  const auto& kernels = head_kernels().typed<Acc>();
  parallel_tickets(int64_t(tasks.size()) * image_blocks, batch * width * classes > kSerialProducts, 1, [&](int64_t ticket) {
    const Task& t = tasks[size_t(ticket / image_blocks)];
    int64_t b = ticket % image_blocks * images;
    kernels.pooled_gradient(P, t.stage, t.d0, t.d1, b, std::min(b + images, batch));
  });
}

template <class Acc>
void Backward<Acc>::weight_gradient(void* dweight, double* da) const {
  constexpr int64_t rows = 16;
  WeightGradientParams<Acc> P{batch, width, classes, int(n), columns, dscores, n * classes, classes, pooled, weight, weight_dtype, {nullptr, 0, 0}, dweight, da};
  if (from_products) P.u = dy, P.u_image = classes, P.u_stage = 0, P.scale = attention.a;
  const auto& kernels = head_kernels().typed<Acc>();
  parallel_tickets((classes + rows - 1) / rows, batch * width * classes > kSerialProducts, 1,
                   [&](int64_t ticket) { kernels.weight_gradient(P, ticket * rows, std::min((ticket + 1) * rows, classes)); });
}

template <class Acc>
void Backward<Acc>::bias_gradient(Acc* dbias) const {
  constexpr int64_t block = 128;  // columns whose sums stay in L1
  for (int64_t c = 0; c < n * classes; c += block) {
    ColumnSums<Acc> sums(std::min(block, n * classes - c));
    for (int64_t b = 0; b < batch; ++b) sums.add(dscores + b * n * classes + c);
    sums.write(dbias + c);
  }
}

// sum_b dy[b,k]: [K]
template <class Acc>
ColumnSums<Acc> Backward<Acc>::dy_sum() const {
  ColumnSums<Acc> sums(classes);
  for (int64_t b = 0; b < batch; ++b) sums.add(dy + b * classes);
  return sums;
}

// dA[i,k] = sum_b dy[b,k] Z[b,i,k]
template <class Acc>
void Backward<Acc>::da_from_scores(double* da) const {
  ColumnSums<Acc> sums(n * classes);
  for (int64_t b = 0; b < batch; ++b) sums.add_product(scores.get() + b * n * classes, dy + b * classes, classes);
  sums.write(da);
}

// dA [n, K] and dy [B, K] -> gradients in the shapes of the parameters, those that there are.
template <class Acc>
void Backward<Acc>::attention_gradient(Acc* dweight, Acc* dbias, const double* da) const {
  if (attention.gated()) {
    ColumnSums<Acc> matrix(n * n), offset(n);
    for (int64_t b = 0; b < batch; ++b) matrix.add(gate_dmatrix.get() + b * n * n), offset.add(gate_doffset.get() + b * n);
    if (dweight) matrix.write(dweight);
    if (dbias) offset.write(dbias);
    return;
  }
  for (int64_t i = 0; dweight && i < n; ++i) {
    if (attention.mode == Attention::Classwise) {
      std::transform(da + i * classes, da + (i + 1) * classes, dweight + i * classes, [](double x) { return Acc(x); });
      continue;
    }
    Acc sum = Acc(sum_of<Acc>(da + i * classes, classes));
    if (attention.mode == Attention::NByN)
      for (int64_t j = 0; j < n; ++j) dweight[j * n + i] = sum;  // all n outputs are summed: the rows of M have one gradient
    else
      dweight[i] = sum;
  }
  if (!dbias) return;
  ColumnSums<Acc> sums = dy_sum();
  if (attention.mode == Attention::Classwise || attention.mode == Attention::Folded)
    sums.write(dbias);
  else
    std::fill(dbias, dbias + (attention.mode == Attention::NByN ? n : 1), Acc(sums.total()));
}

// --- the operator ----------------------------------------------------------------------------------------------------
template <class Acc>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> run(const OptionalTensor& dy, const OptionalTensor& dbranches, const Tensor& pooled, const Tensor& weight,
                                                       const OptionalTensor& bias, const OptionalTensor& attention_weight, const OptionalTensor& attention_bias,
                                                       Attention mode, const std::vector<int64_t>& widths, const std::vector<int64_t>& feature_stages, bool need_weight,
                                                       bool need_bias, bool need_attention) {
  constexpr ScalarType acc_type = sizeof(Acc) == 8 ? ScalarType::Double : ScalarType::Float;
  // Check
  int64_t n = int64_t(widths.size());
  std::vector<int64_t> begin = check_backward(kBackward, dy, dbranches, pooled, weight, bias, widths, feature_stages, acc_type);
  int64_t width = begin.back(), batch = pooled.size(0), classes = weight.size(0);
  AttentionValues<Acc> attention(mode, attention_weight, attention_bias, n, classes);
  Values<Acc> biases(bias, "bias"), dy_values(dy, "dy"), dbranches_values(dbranches, "dbranches");
  Tensor rows = contiguous(weight, kBackward, "weight");
  Tensor columns = contiguous(pooled, kBackward, "pooled");

  // Allocate
  auto output = [&](bool needed, const Tensor& like, ScalarType type) {
    return new_tensor(weight, needed ? shape_of(like) : std::vector<int64_t>{0}, type);
  };
  Tensor dpooled = output(!feature_stages.empty(), pooled, acc_type);
  Tensor dweight = output(need_weight, weight, weight.scalar_type());
  // Small gradients are summed in Acc and rounded once, below.
  bool with_bias = need_bias && bias, with_attention_weight = need_attention && attention_weight, with_attention_bias = need_attention && attention_bias;
  Tensor dbias = output(with_bias, bias ? *bias : weight, acc_type);
  Tensor dattention_weight = output(with_attention_weight, attention_weight ? *attention_weight : weight, acc_type);
  Tensor dattention_bias = output(with_attention_bias, attention_bias ? *attention_bias : weight, acc_type);
  auto round = [](const Tensor& t, const OptionalTensor& like) { return like && like->scalar_type() != t.scalar_type() ? torch::stable::to(t, like->scalar_type()) : t; };
  auto results = [&] {
    return std::make_tuple(dpooled, dweight, round(dbias, bias), round(dattention_weight, attention_weight), round(dattention_bias, attention_bias));
  };
  auto data = [](const Tensor& t) { return static_cast<Acc*>(t.mutable_data_ptr()); };

  // Nothing to sum: zeros
  if (batch == 0 || (!dy && !dbranches)) {
    for (Tensor* t : {&dpooled, &dweight, &dbias, &dattention_weight, &dattention_bias}) torch::stable::zero_(*t);
    return results();
  }

  Backward<Acc> back{n, batch, width, classes, {}, attention, biases.data(), static_cast<const Acc*>(columns.const_data_ptr()), rows.const_data_ptr(),
                     dtype_of(weight, kBackward, "weight"), dy_values.data(), dbranches_values.data(), {}, {}, nullptr, {}, {}};
  for (int64_t i = 0; i < n; ++i) back.columns[i] = {begin[size_t(i)], begin[size_t(i) + 1]};

  // The gradient of Z
  bool with_da = with_attention_weight && dy && !attention.gated();
  back.from_products = dy && !dbranches && !attention.gated() && attention.is_finite();
  if (attention.gated() ? dy.has_value() : with_da && !back.from_products) back.recompute_scores();
  back.compute_dscores();

  // Each gradient from it
  if (!feature_stages.empty()) back.pooled_gradient(data(dpooled), feature_stages);
  if (need_bias && bias) back.bias_gradient(data(dbias));
  Buffer<double> da(with_da ? new double[size_t(n * classes)] : nullptr);
  bool da_from_products = with_da && back.from_products;
  if (need_weight || da_from_products) back.weight_gradient(need_weight ? dweight.mutable_data_ptr() : nullptr, da_from_products ? da.get() : nullptr);
  bool without_columns = std::any_of(widths.begin(), widths.end(), [](int64_t w) { return w == 0; });
  if (da_from_products && (bias || without_columns)) {
    ColumnSums<Acc> sums = back.dy_sum();
    for (int64_t i = 0; i < n; ++i) {
      if (!bias && widths[size_t(i)] != 0) continue;  // Z of a stage without columns is b or 0: a NaN in dy still makes NaN of it
      for (int64_t k = 0; k < classes; ++k) da[size_t(i * classes + k)] += (bias ? double(back.bias[i * classes + k]) : 0.0) * sums.sum(k);
    }
  }
  if (da_from_products && !all_finite(da.get(), n * classes)) {
    back.recompute_scores();
    da_from_products = false;
  }
  if (with_da && !da_from_products) back.da_from_scores(da.get());
  if (dy && need_attention) {
    back.attention_gradient(with_attention_weight ? data(dattention_weight) : nullptr, with_attention_bias ? data(dattention_bias) : nullptr, da.get());
  } else {
    torch::stable::zero_(dattention_weight);
    torch::stable::zero_(dattention_bias);
  }
  return results();
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> interflow_head_backward(const OptionalTensor& dy, const OptionalTensor& dbranches, const Tensor& pooled,
                                                                           const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& attention_weight,
                                                                           const OptionalTensor& attention_bias, const std::string& attention,
                                                                           const std::vector<int64_t>& widths, const std::vector<int64_t>& feature_stages,
                                                                           bool need_weight, bool need_bias, bool need_attention) {
  auto call = dtype_of(weight, kBackward, "weight") == DType::F64 ? run<double> : run<float>;
  return within_memory(kBackward, [&] {
    return call(dy, dbranches, pooled, weight, bias, attention_weight, attention_bias, attention_of(attention), widths, feature_stages, need_weight, need_bias, need_attention);
  });
}

}  // namespace
}  // namespace interflow

INTERFLOW_LIBRARY_IMPL(INTERFLOW_LIBRARY, CPU, m) { m.impl("interflow_head_backward", TORCH_BOX(&interflow::interflow_head_backward)); }
