// What the host side and the CUDA kernels of the stage tap share: parameter structs, launchers. No torch headers.
#pragma once
#include <cuda_runtime_api.h>

#include "stage_tap/cuda/plan.h"

namespace interflow {

// How u, m, dm, du and the mask are reached; the bits are the same.
enum class TapPath : int32_t {
  Wide,    // 16 bytes at a time: rows (NCHW, mean only: planes) are whole pieces, and aligned
  Narrow,  // as pitches and addresses allow
  Staged,  // NCHW whose planes follow each other: through shared memory, in which units arrive and which they leave by 16 bytes
};

struct TapParams {
  TapPlan plan;
  const void* u;                                   // [B, C, H, W]
  int64_t stride_b, stride_c, stride_h, stride_w;  // of u, in elements
  TapPath path;
  int32_t access;                                  // bytes of u that may be read at a time, where its rows are as long
  bool runs;                                       // NCHW: a plane's elements follow each other
  const void* shift;                               // [C] in shift_dtype, or null
  DType shift_dtype;
  int64_t shift_stride;
  bool shift_wide;     // readable in 16 bytes at a time
  void* m;             // [B, C, H/2, W/2] in u's dtype and layout, or null
  int32_t m_access;    // bytes of m that are written at a time
  float* p;            // [B, C]
  uint8_t* mask;       // see ../contract.h, or null
  float* partial;      // several parts: [B, parts, C], sums of v
  uint32_t* arrivals;  // likewise: [B, slabs] from zero and to zero, finished parts
  bool stream;         // larger than what L2 keeps
};

struct TapBackwardParams {
  TapPlan plan;
  const void* dm;                                                 // [B, C, H/2, W/2] in u's dtype, or null
  int64_t dm_stride_b, dm_stride_c, dm_stride_h, dm_stride_w;     // in elements
  bool dm_wide;                                                   // a piece's dm is read at once
  bool dm_dense;                                                  // NCHW: planes follow each other
  const float* dp;                                                // [B, C], or null
  int64_t dp_stride_b, dp_stride_c;
  bool dp_wide;          // readable in 16 bytes at a time
  const uint8_t* mask;   // as forward wrote it
  void* du;              // [B, C, H, W] in u's dtype and layout
  TapPath path;
  int32_t access;        // bytes of du that may be written at a time, where its rows are as long
  float* dshift;         // [C], or null
  float* rows;           // [ceil(B / images) parts, C], sums of du
  int32_t row_count, rows_at_once;
  float* sums;           // [ceil(row_count / rows_at_once), C], sums of rows, where there are several
  uint32_t* arrivals;    // [the same, slabs] and [slabs], from zero and to zero
  bool stream;
};

cudaError_t launch_tap(const TapParams& params, cudaStream_t stream);
cudaError_t launch_tap_backward(const TapBackwardParams& params, cudaStream_t stream);

}  // namespace interflow
