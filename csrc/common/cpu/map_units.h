// What the operators at a stage's end share on the host side of a CPU: units of a map, the shift as kernels take it, sums of units.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <memory>

#include "common/cpu/column_sums.h"
#include "common/cpu/parallel.h"
#include "common/feature_map.h"

namespace interflow {

constexpr int64_t kUnitBytes = 64 << 10;
constexpr int64_t kUnitsAtOnce = 16;

// Runs every unit of every image, neighbours in runs. P.plan: shape, dtype and parts, units of one image.
template <class Params>
void run_units(void (*unit)(const Params&, int64_t image, int64_t part), const Params& P) {
  const MapShape& s = P.plan.shape;
  bool worthwhile = s.batch * s.channels * s.pixels() * element_size(P.plan.dtype) > kSerialBytes;
  parallel_tickets(s.batch * P.plan.parts, worthwhile, kUnitsAtOnce, [&](int64_t i) { unit(P, i / P.plan.parts, i % P.plan.parts); });
}

// Behind a map's last element, which is there: reads up to here are safe.
inline const void* end_of(const Tensor& t, DType dtype) {
  int64_t last = 0;
  for (int64_t i = 0; i < 4; ++i) last += (t.size(i) - 1) * t.stride(i);
  return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * element_size(dtype);
}

inline StridedMap strided(const OptionalTensor& t, DType dtype) {
  if (!t) return {};
  return {t->const_data_ptr(), t->stride(0), t->stride(1), t->stride(2), t->size(3) == 1 ? 1 : t->stride(3), end_of(*t, dtype)};
}

// shift [C] rounded to u's dtype, as Acc; -0 (which changes no number) where there is none. Readable a vector beyond its end.
template <class Acc>
std::unique_ptr<Acc[]> shift_values(const OptionalTensor& shift, int64_t channels, DType dtype, const char* op) {
  std::unique_ptr<Acc[]> values(new Acc[size_t(channels) + 8]);
  std::fill(values.get(), values.get() + channels + 8, Acc(-0.0));
  if (!shift) return values;
  int64_t stride = shift->stride(0);
  auto fill = [&](auto* data) {
    for (int64_t c = 0; c < channels; ++c) values[size_t(c)] = Acc(data[c * stride]);
  };
  const void* data = shift->const_data_ptr();
  switch (dtype_of(*shift, op, "shift")) {
    case DType::F32: fill(static_cast<const float*>(data)); break;
    case DType::F64: fill(static_cast<const double*>(data)); break;
    case DType::BF16: fill(static_cast<const c10::BFloat16*>(data)); break;
    case DType::F16: fill(static_cast<const c10::Half*>(data)); break;
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (dtype == DType::BF16) values[size_t(c)] = Acc(float(c10::BFloat16(float(values[size_t(c)]))));
    if (dtype == DType::F16) values[size_t(c)] = Acc(float(c10::Half(float(values[size_t(c)]))));
  }
  return values;
}

// dshift[c] = the sum of rows [number, C], in one order.
template <class Acc>
void sum_rows(const Acc* rows, int64_t number, int64_t channels, Acc* out) {
  ColumnSums<Acc> sums(channels);
  for (int64_t i = 0; i < number; ++i) sums.add(rows + i * channels);
  sums.write(out);
}

}  // namespace interflow
