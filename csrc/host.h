// What every operator's host side needs of torch's stable ABI: aliases, checks with values in the message, dtypes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "interflow_head.h"

namespace interflow {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline DType dtype_of(const Tensor& t, const char* op, const std::string& name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::Double: return DType::F64;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be fp32, fp64, bf16 or fp16, got ", torch::headeronly::toString(t.scalar_type()));
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::F64: return ScalarType::Double;
    case DType::BF16: return ScalarType::BFloat16;
    case DType::F16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

// A new contiguous tensor on the device of `like`: straight through the shim, a third of the dispatcher's cost.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(),
                                                         torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device, index, &handle));
  return Tensor(handle);
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* op, const char* name) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (same) return;
  std::string expected = "[";
  for (size_t i = 0; i < shape.size(); ++i) expected += (i ? ", " : "") + std::to_string(shape[i]);
  STD_TORCH_CHECK(false, op, ": ", name, " must be ", expected, "], got ", shape_text(t));
}

// Runs f(i) for i in [0, count) on all threads; results must not depend on which thread takes which i. Each takes `run`
// neighbouring indices at a time: long enough for a sequential stream through memory, short enough to even out the threads.
template <class F>
void parallel_tickets(int64_t count, bool worthwhile, int64_t longest_run, const F& f) {
  int64_t threads = worthwhile && count > 1 ? std::min<int64_t>(count, torch::stable::get_num_threads()) : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  int64_t run = std::clamp<int64_t>(count / (threads * 8), 1, longest_run);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < count;)
      for (int64_t end = std::min(i + run, count); i < end; ++i) f(i);
  });
}

}  // namespace interflow
