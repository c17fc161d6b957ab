// What forward and backward share on the host side: the attention's parameters as the kernels take them.
#pragma once
#include <memory>

#include "interflow_head/checks.h"
#include "interflow_head/cpu/kernels.h"
#include "common/cpu/parallel.h"

namespace interflow {

// Products of fewer multiplications run on the calling thread.
constexpr int64_t kSerialProducts = 1 << 16;

// A small tensor as contiguous Acc: its own memory where it is that already, else a copy.
template <class Acc>
class Values {
 public:
  Values() = default;
  Values(const Tensor& t, const char* name);
  Values(const OptionalTensor& t, const char* name) : Values(t ? Values(*t, name) : Values()) {}
  const Acc* data() const { return data_; }

 private:
  std::unique_ptr<Acc[]> copy_;
  const Acc* data_ = nullptr;
};

// Everything about the attention, checked and in Acc.
template <class Acc>
struct AttentionValues {
  AttentionValues(Attention mode, const OptionalTensor& weight, const OptionalTensor& bias, int64_t n, int64_t classes);

  Attention mode;
  Values<Acc> weight, bias;
  Aggregation<Acc> a{nullptr, 0, 0};  // linear modes
  const Acc* c = nullptr;             // [K] or [1] by c_klass
  int64_t c_klass = 0;
  bool gated() const { return mode == Attention::Gated; }
  const Acc* mixing() const { return mode == Attention::NByN ? weight.data() : nullptr; }  // M, of which a is the sum of columns
  bool is_finite() const;                                                                // all of a is
  AttentionValues(const AttentionValues&) = delete;  // a and c point into it

 private:
  int64_t values_ = 0;   // of a
  Acc row_[kMaxStages];  // nxn: column sums of M
  Acc sum_;              // nxn: sum of c
};

// Forward product of pooled features, on all threads: used forward, and backward where Z is needed again.
template <class Acc>
void run_product(const ProductParams<Acc>& params);

}  // namespace interflow
