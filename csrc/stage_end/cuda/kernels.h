// What the host side and the CUDA kernels of the stage end share: parameter structs, launchers. No torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include "stage_end/cuda/plan.h"

namespace interflow {

// A map that is read, and how: access: bytes at a time, of which a unit's runs, and their beginnings, are multiples; one element: singly, wherever it is;
// 0 (NCHW): element by element, its rows and planes not following each other.
struct EndMap {
  StridedMap map;
  int32_t access;
  bool dense;  // NHWC: an image is one run, shorter than 2^30
};

struct EndParams {
  EndPlan plan;
  EndMap u, residual;  // [B, C, H, W]; residual may be none
  bool relu;
  bool wide;           // every map by 16 bytes; NHWC: and dense
  const void* shift;   // [C] in shift_dtype, or null
  DType shift_dtype;
  int64_t shift_stride;
  bool shift_wide;     // readable in 16 bytes at a time
  void* v;             // [B, C, H, W] in u's dtype and layout
  int32_t v_access;    // bytes of v that are written at a time
  float* p;            // [B, C]
  float* partial;      // several parts: [B, parts, C], sums of v
  uint32_t* arrivals;  // likewise: [B, slabs] from zero and to zero, finished parts
  bool stream;         // larger than what L2 keeps
};

struct EndBackwardParams {
  EndPlan plan;
  EndMap dv, v;  // [B, C, H, W]; none: no gradient of v; nothing is masked
  bool wide;     // every map by 16 bytes; NHWC: and dense
  const float* dp;  // [B, C], or null
  int64_t dp_stride_b, dp_stride_c;
  bool dp_wide;         // readable in 16 bytes at a time
  void* du;             // [B, C, H, W] in u's dtype and layout
  int32_t du_access;    // bytes of du that are written at a time
  float* dshift;        // [C], or null
  float* rows;          // [ceil(B / images) parts, C], sums of d
  int32_t row_count, rows_at_once;
  float* sums;          // [ceil(row_count / rows_at_once), C], sums of rows, where there are several
  uint32_t* arrivals;   // [the same, slabs] and [slabs], from zero and to zero
  bool stream;
};

cudaError_t launch_end(const EndParams& params, cudaStream_t stream);
cudaError_t launch_end_backward(const EndBackwardParams& params, cudaStream_t stream);

}  // namespace interflow
