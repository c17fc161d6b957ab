// What the host side and the kernels of each instruction set share: the plan, parameter structs, the table of kernels.
//
// Work is cut into units whose bounds and summation order depend on C, H, W and the layout only, never on B or the thread
// count: NCHW by runs of channels, NHWC by runs of pixels.
#pragma once
#include <atomic>

#include "stage_end/contract.h"

namespace interflow {

struct EndPlan {
  MapShape shape;
  DType dtype;        // of u, residual, v, dv, du
  int64_t parts;      // units of one image
  int64_t part_size;  // NCHW: channels; NHWC: pixels
};

struct EndParams {
  EndPlan plan;
  bool relu;
  StridedMap u, residual;      // [B, C, H, W]; residual may be none
  const void* shift;           // [C] Acc on u's grid, -0 where there is none; readable in whole vectors
  void* v;                     // [B, C, H, W] in u's dtype and layout
  void* p;                     // [B, C] Acc
  void* partial;               // NHWC with several parts: [B, parts, C] Acc, sums of v
  std::atomic<int>* arrivals;  // likewise: [B] from zero, finished parts
};

struct EndBackwardParams {
  EndPlan plan;
  StridedMap dv, v;  // [B, C, H, W]; none: no gradient of v; nothing is masked
  const void* dp;    // [B, C] Acc, or null: gradient of p
  void* du;          // [B, C, H, W] in u's dtype and layout
  void* dshift;      // [B, parts, C] (NHWC) or [B, C] (NCHW) Acc, sums of du before it is rounded, or null
};

struct EndKernels {
  void (*forward)(const EndParams&, int64_t image, int64_t part);
  void (*backward)(const EndBackwardParams&, int64_t image, int64_t part);
};

extern const EndKernels end_kernels_baseline;
#if defined(__x86_64__)
extern const EndKernels end_kernels_avx2;
#endif

}  // namespace interflow
