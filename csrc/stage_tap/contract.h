// The stage tap's contract between host code and kernels. No torch headers.
//
//   v = relu(u + shift)        [B, C, H, W]              each step rounded to u's dtype; never written
//   m = max_pool2d(v, 2, 2)    [B, C, H/2, W/2]          rounded down
//   p = mean of v over H, W    [B, C]
//
// A window is a 2x2 square of v; odd H or W leave incomplete ones, which count in p but not in m. The mask keeps what
// backward needs, in place of u.
//   With max-pool: one byte a window, ceil(H/2) x ceil(W/2) a map. Elements of a window: 0 1 in its upper row, 2 3 below.
//     bit j      element j passes the gradient: not v <= 0 (so NaN does)
//     bit 4 + j  element j is the maximum and passes; the first of equals, the last NaN; none in an incomplete window
//   Mean only: one bit an element, least significant first, 1 where it passes: map after map in NCHW, each filled up to whole
//     bytes; pixel after pixel in NHWC, likewise.
//   du = passes * dp / (H * W) + is the maximum * dm        dshift = sum of du over B, H, W
//
// B batch, C, H, W channels, height, width. Acc is double for fp64, else float.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/map_shape.h"

namespace interflow {

struct TapShape : MapShape {
  int64_t windows_h() const { return (height + 1) / 2; }
  int64_t windows_w() const { return (width + 1) / 2; }
  // Bytes of the mask that belong to one image.
  int64_t mask_bytes(bool max_pool) const {
    if (max_pool) return channels * windows_h() * windows_w();
    return channels_last ? pixels() * ((channels + 7) / 8) : channels * ((pixels() + 7) / 8);
  }
};

}  // namespace interflow
