// What every operator's host side needs of torch's stable ABI: aliases, checks with values in the message, dtypes.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <new>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "common/dtype.h"
#include "common/registration.h"

// Its name in torch 2.10 and 2.11.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

// STD_TORCH_CHECK with the sentence alone: no function, file and line of the building machine in front of it.
#define INTERFLOW_CHECK(condition, ...) \
  if (!(condition)) [[unlikely]]        \
  ::interflow::fail(__VA_ARGS__)

namespace interflow {

template <class... Parts>
[[noreturn]] inline void fail(const Parts&... parts) {
  std::ostringstream text;
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline std::string shape_text(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < t.dim(); ++i) shape.push_back(t.size(i));
  return shape;
}

inline std::string shape_text(const Tensor& t) { return shape_text(shape_of(t)); }

inline DType dtype_of(ScalarType type, const char* op, const std::string& name) {
  switch (type) {
    case ScalarType::Float: return DType::F32;
    case ScalarType::Double: return DType::F64;
    case ScalarType::BFloat16: return DType::BF16;
    case ScalarType::Half: return DType::F16;
    default: break;
  }
  fail(op, ": ", name, " must be fp32, fp64, bf16 or fp16, got ", torch::headeronly::toString(type));
}

// The dispatcher takes None for a tensor and hands on one that is not defined.
inline void check_defined(const Tensor& t, const char* op, const std::string& name) { INTERFLOW_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None"); }

inline DType dtype_of(const Tensor& t, const char* op, const std::string& name) {
  check_defined(t, op, name);
  return dtype_of(t.scalar_type(), op, name);
}

inline ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::F64: return ScalarType::Double;
    case DType::BF16: return ScalarType::BFloat16;
    case DType::F16: return ScalarType::Half;
    default: return ScalarType::Float;
  }
}

#if INTERFLOW_EMULATION
void note_unwritten(const Tensor& t);  // poisons it, and remembers that nobody has written it
#endif

// A new tensor on the device of `like`: straight through the shim, a third of the dispatcher's cost.
inline Tensor new_strided(const Tensor& like, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides, ScalarType type) {
  int32_t device = 0, index = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle handle;
  AOTITorchError error = aoti_torch_empty_strided(int64_t(shape.size()), shape.data(), strides.data(),
                                                  torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device, index, &handle);
  if (error != AOTI_TORCH_SUCCESS)
    fail("interflow_kernels: no memory for a result of shape ", shape_text(shape), " in ", torch::headeronly::toString(type), "; use a smaller batch, or smaller maps");
  Tensor made(handle);
#if INTERFLOW_EMULATION
  note_unwritten(made);
#endif
  return made;
}

inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  return new_strided(like, shape, strides, type);
}

// [B, C, H, W] in channels_last or contiguous memory.
inline Tensor new_map(const Tensor& like, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last, ScalarType type) {
  if (!channels_last) return new_tensor(like, {batch, channels, height, width}, type);
  int64_t c = std::max<int64_t>(channels, 1), h = std::max<int64_t>(height, 1), w = std::max<int64_t>(width, 1);
  return new_strided(like, {batch, channels, height, width}, {c * h * w, 1, c * w, c}, type);
}

inline void check_shape(const Tensor& t, const std::vector<int64_t>& shape, const char* op, const char* name) {
  bool same = t.dim() == int64_t(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = t.size(int64_t(i)) == shape[i];
  if (!same) fail(op, ": ", name, " must be ", shape_text(shape), ", got ", shape_text(t));
}

// t itself where it is contiguous, else a copy that is.
inline Tensor contiguous(const Tensor& t, const char* op, const char* name) {
  if (t.is_contiguous()) return t;
  try {
    return torch::stable::contiguous(t);
  } catch (const std::runtime_error&) {
    fail(op, ": no memory for a contiguous copy of ", name, ", ", shape_text(t), " in ", torch::headeronly::toString(t.scalar_type()));
  }
}

// Runs an operator; a lack of memory for what it keeps between its steps becomes a sentence too.
template <class F>
auto within_memory(const char* op, const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    fail(op, ": no memory for what is kept between its steps; use a smaller batch, or smaller maps");
  }
}

}  // namespace interflow
