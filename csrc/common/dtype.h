// The floating dtypes that kernels read and write. No torch headers.
#pragma once
#include <cstdint>

namespace interflow {

enum class DType : uint8_t { F32, F64, BF16, F16 };

constexpr int64_t element_size(DType dtype) { return dtype == DType::F64 ? 8 : dtype == DType::F32 ? 4 : 2; }

}  // namespace interflow
