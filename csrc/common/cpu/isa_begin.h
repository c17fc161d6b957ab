// Opens a file's own part for the instruction set INTERFLOW_ISA: system headers before, the target set after, then vector.h.
// Close with isa_end.h. Included once by each file that compiles kernels.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace interflow {
using c10::BFloat16;
using c10::Half;
}  // namespace interflow

// From here on, and in no header above, functions may use the instruction set.
#if defined(INTERFLOW_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

#include "common/cpu/vector.h"
