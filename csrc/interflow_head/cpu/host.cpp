// Shared host side of the head: instruction set choice, the attention's parameters, the forward product's parallel loop.
#include "interflow_head/cpu/host.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/cpu/isa.h"

namespace interflow {

const HeadKernels& head_kernels() {
#if defined(__x86_64__)
  if (use_avx2()) return head_kernels_avx2;
#endif
  return head_kernels_baseline;
}

// --- small tensors as Acc --------------------------------------------------------------------------------------------
namespace {
template <class Acc, class T>
void gather(const Tensor& t, Acc* out) {
  int64_t dim = t.dim(), size[3] = {1, 1, 1}, stride[3] = {0, 0, 0};
  for (int64_t i = 0; i < dim; ++i) size[3 - dim + i] = t.size(i), stride[3 - dim + i] = t.stride(i);
  const T* p = static_cast<const T*>(t.const_data_ptr());
  for (int64_t i = 0; i < size[0]; ++i)
    for (int64_t j = 0; j < size[1]; ++j)
      for (int64_t k = 0; k < size[2]; ++k) *out++ = Acc(p[i * stride[0] + j * stride[1] + k * stride[2]]);
}
}  // namespace

template <class Acc>
Values<Acc>::Values(const Tensor& t, const char* name) {
  DType dtype = dtype_of(t, kHead, name);
  if (dtype == (sizeof(Acc) == 8 ? DType::F64 : DType::F32) && t.is_contiguous()) {
    data_ = static_cast<const Acc*>(t.const_data_ptr());
    return;
  }
  copy_.reset(new Acc[size_t(t.numel()) + 1]);
  data_ = copy_.get();
  switch (dtype) {
    case DType::F32: gather<Acc, float>(t, copy_.get()); return;
    case DType::F64: gather<Acc, double>(t, copy_.get()); return;
    case DType::BF16: gather<Acc, c10::BFloat16>(t, copy_.get()); return;
    case DType::F16: gather<Acc, c10::Half>(t, copy_.get()); return;
  }
}
template class Values<float>;
template class Values<double>;

// --- attention -------------------------------------------------------------------------------------------------------
template <class Acc>
AttentionValues<Acc>::AttentionValues(Attention mode_, const OptionalTensor& w, const OptionalTensor& b, int64_t n, int64_t k) : mode(mode_) {
  check_attention(mode, w, b, n, k);
  weight = Values<Acc>(w, "attention_weight");
  bias = Values<Acc>(b, "attention_bias");
  if (mode == Attention::Gated) return;
  c = bias.data();
  if (mode == Attention::Hard || mode == Attention::OneByN) a = {weight.data(), 1, 0};
  if (mode == Attention::Classwise) a = {weight.data(), k, 1};
  values_ = mode == Attention::Folded ? 0 : mode == Attention::Classwise ? n * k : n;
  if (mode == Attention::Classwise || mode == Attention::Folded) c_klass = 1;
  if (mode != Attention::NByN) return;
  // y sums the n outputs: only M's column sums and the sum of c count.
  for (int64_t i = 0; i < n; ++i) {
    row_[i] = 0;
    for (int64_t j = 0; j < n; ++j) row_[i] += weight.data()[j * n + i];
  }
  a = {row_, 1, 0};
  if (c) {
    sum_ = 0;
    for (int64_t j = 0; j < n; ++j) sum_ += c[j];
    c = &sum_;
  }
}
template <class Acc>
bool AttentionValues<Acc>::is_finite() const {
  return std::all_of(a.a, a.a + values_, [](Acc x) { return x - x == 0; });
}
template struct AttentionValues<float>;
template struct AttentionValues<double>;

// --- forward product -------------------------------------------------------------------------------------------------
template <class Acc>
void run_product(const ProductParams<Acc>& P) {
  constexpr int64_t rows = 24, images = 64;  // 24 rows of W (135 KB at D = 1408) stay in L2 while the images pass
  int64_t row_blocks = (P.classes + rows - 1) / rows, image_blocks = (P.batch + images - 1) / images;
  const auto& kernels = head_kernels().typed<Acc>();
  parallel_tickets(row_blocks * image_blocks, P.batch * P.width * P.classes > kSerialProducts, 1, [&](int64_t ticket) {
    int64_t k = ticket / image_blocks * rows, b = ticket % image_blocks * images;
    kernels.product(P, k, std::min(k + rows, P.classes), b, std::min(b + images, P.batch));
  });
}
template void run_product(const ProductParams<float>&);
template void run_product(const ProductParams<double>&);

}  // namespace interflow
