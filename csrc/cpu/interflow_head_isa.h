// All kernels of the head for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(INTERFLOW_AVX2)
#include <immintrin.h>
#endif

#include "interflow_head_kernels.h"

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

#include "vector.h"

#include "interflow_head_pool.h"

#include "interflow_head_gate.h"

#include "interflow_head_product.h"

#if defined(INTERFLOW_AVX2)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#define INTERFLOW_HEAD_TYPED(isa, Acc) {isa::product<Acc>, isa::gate_backward<Acc>, isa::pooled_gradient<Acc>, isa::weight_gradient<Acc>}
#define INTERFLOW_HEAD_TABLE(name, isa) {name, isa::pool_unit, INTERFLOW_HEAD_TYPED(isa, float), INTERFLOW_HEAD_TYPED(isa, double)}
