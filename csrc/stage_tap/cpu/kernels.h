// What the host side and the kernels of each instruction set share: the plan, parameter structs, the table of kernels.
//
// Work is cut into units whose bounds and summation order depend on C, H, W and the layout only, never on B or the thread
// count: NCHW by runs of channels, NHWC by runs of windows (or pixels, where only the mean is taken).
#pragma once
#include <atomic>

#include "stage_tap/contract.h"

namespace interflow {

struct TapPlan {
  TapShape shape;
  DType dtype;        // of u, m, dm, du
  bool max_pool;
  int64_t parts;      // units of one image
  int64_t part_size;  // NCHW: channels; NHWC: windows, or pixels where only the mean is taken
};

struct TapParams {
  TapPlan plan;
  const void* u;                                   // [B, C, H, W]
  int64_t stride_b, stride_c, stride_h, stride_w;  // of u, in elements
  const void* u_end;                               // behind u's last element: reads up to here are safe
  const void* shift;                               // [C] Acc on u's grid, -0 where there is none; readable in whole vectors
  void* m;                                         // [B, C, H/2, W/2] in u's dtype and layout, or null
  void* p;                                         // [B, C] Acc
  uint8_t* mask;                                   // or null
  void* partial;                                   // NHWC with several parts: [B, parts, C] Acc, sums of v
  std::atomic<int>* arrivals;                      // likewise: [B] from zero, finished parts
};

struct TapBackwardParams {
  TapPlan plan;
  const void* dm;                                     // [B, C, H/2, W/2] in u's dtype, any strides, or null
  int64_t dm_stride_b, dm_stride_c, dm_stride_h, dm_stride_w;
  const void* dp;       // [B, C] Acc, or null: gradient of p
  const uint8_t* mask;  // as forward wrote it
  void* du;             // [B, C, H, W] in u's dtype and layout
  void* dshift;         // [B, parts, C] (NHWC) or [B, C] (NCHW) Acc, sums of du, or null
};

struct TapKernels {
  void (*forward)(const TapParams&, int64_t image, int64_t part);
  void (*backward)(const TapBackwardParams&, int64_t image, int64_t part);
};

extern const TapKernels tap_kernels_baseline;
#if defined(__x86_64__)
extern const TapKernels tap_kernels_avx2;
#endif

}  // namespace interflow
