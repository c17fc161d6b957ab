// What the host side and the CUDA kernels of the stage tap share: the plan, parameter structs, launchers. No torch headers.
//
// A map is cut into pieces: NHWC: a window (or a pixel, where only the mean is taken) by kTapVector channels; NCHW: a tile of two
// rows by kTapVector columns (or eight elements that follow each other). A unit is what a block does at a time: `part_size`
// positions of `slab` channels of `images` images. Bounds, vector widths and the order of sums depend on C, H, W and the layout
// only: never on B, the grid or an address.
#pragma once
#include <cuda_runtime_api.h>

#include "../stage_tap.h"

namespace interflow {

constexpr int kTapThreads = 256;

// Elements of a thread's piece: 16 bytes, or what fills a byte of the mask.
constexpr int tap_vector(DType dtype, bool max_pool) { return max_pool ? int(16 / element_size(dtype)) : 8; }

// n / divisor for 0 <= n < 2^31 without a division.
struct Divider {
  uint32_t divisor, multiplier, shift;
};

struct TapPlan {
  TapShape shape;
  DType dtype;          // of u, m, dm, du
  bool max_pool;
  int32_t slab;         // channels of a unit
  int32_t images;       // images of a unit: several where NHWC maps are small
  int32_t lanes;        // threads that share the positions of one image and vector of channels (NCHW: of one plane)
  int32_t positions;    // of one image
  int32_t part_size;    // positions of a unit
  int32_t parts, slabs;
  uint32_t units;
  Divider row;          // positions of a row; NCHW, mean only: elements of a row
  float pixels, mean;   // H W and 1 / (H W)
};

struct TapParams {
  TapPlan plan;
  const void* u;                                   // [B, C, H, W]
  int64_t stride_b, stride_c, stride_h, stride_w;  // of u, in elements
  int32_t access;                                  // bytes of u that are read at a time; 16 allows the wide kernels
  bool runs;                                       // NCHW: a plane's elements follow each other
  const void* shift;                               // [C] in shift_dtype, or null
  DType shift_dtype;
  int64_t shift_stride;
  bool shift_wide;     // readable in 16 bytes at a time
  void* m;             // [B, C, H/2, W/2] in u's dtype and layout, or null
  int32_t m_access;    // bytes of m that are written at a time
  float* p;            // [B, C]
  uint8_t* mask;       // see ../stage_tap.h, or null
  float* partial;      // several parts: [B, parts, C], sums of v
  uint32_t* arrivals;  // likewise: [B, slabs] from zero and to zero, finished parts
  bool stream;         // larger than what L2 keeps
};

struct TapBackwardParams {
  TapPlan plan;
  const void* dm;                                                 // [B, C, H/2, W/2] in u's dtype, or null
  int64_t dm_stride_b, dm_stride_c, dm_stride_h, dm_stride_w;     // in elements
  bool dm_wide;                                                   // a piece's dm is read at once
  const float* dp;                                                // [B, C], or null
  int64_t dp_stride_b, dp_stride_c;
  bool dp_wide;          // readable in 16 bytes at a time
  const uint8_t* mask;   // as forward wrote it
  void* du;              // [B, C, H, W] in u's dtype and layout
  int32_t access;        // bytes of du that are written at a time; 16 allows the wide kernels
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
