// The head's contract between host code and kernels: parameter structs with a shape for each pointer. No torch headers.
//
//   p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw)))   [B, D_i]   pooled
//   z_i = p_i W_i^T + b_i                               [B, K]     branch scores, Z = stack(z_i): [B, n, K]
//   y   = attention(Z)                                  [B, K]     logits
//
// B batch, n stages, C, H, W of a stage, (Sh, Sw) pooled size, D_i = C_i*Sh*Sw, D = sum D_i, K classes.
// Acc is the accumulation type: double where the weight is fp64, else float.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace interflow {

constexpr int kMaxStages = 16;

// What y is, given Z. All but Gated are linear: y[b,k] = sum_i A[i,k] Z[b,i,k] + c[k].
enum class Attention : uint8_t { Hard, OneByN, NByN, Classwise, Gated, Folded };

// A numbered range of columns of pooled, weight and dpooled: one stage.
struct Columns {
  int64_t begin;
  int64_t end;
};

// One feature: [B, C, H, W] with any strides; already pooled [B, D_i] is C = D_i, H = W = Sh = Sw = 1.
struct Stage {
  const void* data;
  DType dtype;
  int64_t channels, height, width;                 // C, H, W
  int64_t stride_b, stride_c, stride_h, stride_w;  // in elements
  int64_t bins_h, bins_w;                          // Sh, Sw
  int64_t column;                                  // first column of this stage in pooled
};

// A[i,k] = a[i * stage + k * klass]: stride 0 where the weight does not depend on the class. a null means 1 everywhere.
template <class Acc>
struct Aggregation {
  const Acc* a;
  int64_t stage;
  int64_t klass;
};

}  // namespace interflow
