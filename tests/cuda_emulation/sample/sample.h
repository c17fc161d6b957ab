// Small kernels in the manner of the operators, for the emulation's own tests, which break them by edits.
#pragma once
#include <cstdint>

namespace interflow {

struct SampleParams {
  const float* x;       // [rows, width]
  float* partial;       // [rows]
  float* y;             // [rows] sums of rows, or [1] their sum
  uint32_t* counters;   // [2]
  int64_t rows, width;
};

}  // namespace interflow
