// What the host side and the CUDA kernels of the stage tap share: the plan, parameter structs, launchers. No torch headers.
//
// A map is cut into pieces: NHWC: a window (or a pixel, where only the mean is taken) by kTapVector channels; NCHW: a tile of
// kTapVector / 2 windows that follow each other, as the mask's bytes do (or eight elements that follow each other). A unit is what a
// block does at a time: `part_size` positions of `slab` channels of `images` images. Bounds, vector widths and the order of sums
// depend on C, H, W, the layout and the dtype only: never on B, the grid or an address.
#pragma once
#include <cuda_runtime_api.h>

#include "stage_tap/contract.h"

namespace interflow {

constexpr int kTapThreads = 256;

// Elements of a thread's piece: 16 bytes, or what fills a byte of the mask.
constexpr int tap_vector(DType dtype, bool max_pool) { return max_pool ? int(16 / element_size(dtype)) : 8; }

// What a unit of u may take of a block's shared memory. With m, the mask, dp and sums that makes up to 49 KB: two blocks have 100 KB, three 164.
constexpr int64_t kTapStagedBytes = 28 << 10;

// How u, m, dm, du and the mask are reached; the bits are the same.
enum class TapPath : int32_t {
  Wide,    // 16 bytes at a time: rows (NCHW, mean only: planes) are whole pieces, and aligned
  Narrow,  // as pitches and addresses allow
  Staged,  // NCHW whose planes follow each other: through shared memory, in which units arrive and which they leave by 16 bytes
};

// Elements of one unit, at most, and of every part of a plane but its last.
struct TapRuns {
  int32_t u, m, mask;
};

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
  int32_t positions;    // of one image: windows or pixels; NCHW, mean only: pieces
  int32_t part_size;    // positions of a unit
  int32_t parts, slabs;
  Divider by_parts, by_slabs;
  uint32_t units;
  Divider row;          // positions of a row; NCHW, mean only: elements of a row
  float pixels, mean;   // H W and 1 / (H W)
  TapRuns staged;       // NCHW units that fit into shared memory; else zeros
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
