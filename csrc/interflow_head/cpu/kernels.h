// What the host side and the kernels of each instruction set share: the pooling plan, parameter structs, the table of kernels.
#pragma once
#include <atomic>
#include <cstdint>

#include "interflow_head/contract.h"

namespace interflow {

// --- pooling ---------------------------------------------------------------------------------------------------------
// Where stride 1 is in a map: along W (or H*W), along C, or nowhere.
enum class Way : uint8_t { Planes, Pixels, Strided };

struct StagePlan {
  Stage map;
  Way way;
  int64_t parts;       // units of one image
  int64_t part_size;   // Planes, Strided: channels a unit; Pixels with one bin: pixels a unit
  int64_t first_unit;  // of this stage; image b's are first_unit + b * parts ...
  int64_t partial;     // offset of [B, parts, C] in PoolPlan::partial; -1 where no sums have to meet
  int64_t arrival;     // offset of [B] in PoolPlan::arrivals
};

struct PoolPlan {
  StagePlan stages[kMaxStages];
  int count;                    // n
  int64_t batch;                // B
  int64_t width;                // D
  int64_t units;                // over all stages and images
  void* pooled;                 // [B, D] Acc
  void* partial;                // Acc; sums of pixel runs
  std::atomic<int>* arrivals;   // finished runs of each image, from zero
};

// --- forward product -------------------------------------------------------------------------------------------------
template <class Acc>
struct ProductParams {
  int64_t batch, width, classes;  // B, D, K
  int count;                      // n
  const Columns* columns;         // [n]
  const Acc* pooled;              // [B, D]
  const void* weight;             // [K, D] weight_dtype
  DType weight_dtype;
  const Acc* bias;     // [n, K] or null
  Aggregation<Acc> a;  // linear modes
  const Acc* mixing;   // nxn: M [n, n], of which a is the sum of columns; else null
  const Acc* c;        // [K] or, c_klass = 0, [1]; null: 0
  int64_t c_klass;
  const Acc* gate_matrix;  // [n, n] for Gated, else null
  const Acc* gate_offset;  // [n]
  Acc* scores;             // [B, n, K] or null; Gated needs it
  void* branches;          // [B, n, K] out_dtype or null
  void* y;                 // [B, K] out_dtype or null
  DType out_dtype;
};

// --- backward --------------------------------------------------------------------------------------------------------
// dscores [B, n, K] is the gradient of Z; for linear modes A[i,k] dy[b,k] + dZ[b,i,k].
template <class Acc>
struct GateBackwardParams {
  int64_t batch, classes;  // B, K
  int count;               // n
  const Acc* scores;       // [B, n, K]
  const Acc* dy;           // [B, K]
  const Acc* dbranches;    // [B, n, K] or null
  const Acc* matrix;       // [n, n]
  const Acc* offset;       // [n]
  Acc* dscores;            // [B, n, K]
  Acc* dmatrix;            // [B, n, n] one for each image
  Acc* doffset;            // [B, n]
};

template <class Acc>
struct PooledGradientParams {
  int64_t batch, width, classes;  // B, D, K
  int count;                      // n
  const Acc* dscores;             // [B, n, K]
  const void* weight;             // [K, D]
  DType weight_dtype;
  Acc* dpooled;  // [B, D]
};

// dW[k, d] = scale[i,k] * sum_b u[b,i,k] p[b,d]; dA[i,k] = sum over d of stage i of W[k,d] * (that sum, unscaled).
template <class Acc>
struct WeightGradientParams {
  int64_t batch, width, classes;  // B, D, K
  int count;                      // n
  const Columns* columns;         // [n]
  const Acc* u;                   // u[b * u_image + i * u_stage + k]
  int64_t u_image, u_stage;
  const Acc* pooled;   // [B, D]
  const void* weight;  // [K, D]
  DType weight_dtype;
  Aggregation<Acc> scale;  // null: 1
  void* dweight;           // [K, D] weight_dtype or null
  double* da;              // [n, K] or null
};

// --- the kernels of one instruction set ------------------------------------------------------------------------------
template <class Acc>
struct TypedKernels {
  void (*product)(const ProductParams<Acc>&, int64_t k0, int64_t k1, int64_t b0, int64_t b1);
  void (*gate_backward)(const GateBackwardParams<Acc>&, int64_t image);
  void (*pooled_gradient)(const PooledGradientParams<Acc>&, int stage, int64_t d0, int64_t d1, int64_t b0, int64_t b1);
  void (*weight_gradient)(const WeightGradientParams<Acc>&, int64_t k0, int64_t k1);
};

struct HeadKernels {
  const char* name;
  void (*pool_unit)(const PoolPlan&, const StagePlan&, int64_t image, int64_t part);
  TypedKernels<float> f32;
  TypedKernels<double> f64;
  template <class Acc>
  const TypedKernels<Acc>& typed() const {
    if constexpr (sizeof(Acc) == 4)
      return f32;
    else
      return f64;
  }
};

extern const HeadKernels head_kernels_baseline;
#if defined(__x86_64__)
extern const HeadKernels head_kernels_avx2;
#endif

// The widest set that this processor has; INTERFLOW_CPU_ISA=baseline narrows it.
const HeadKernels& head_kernels();

}  // namespace interflow
