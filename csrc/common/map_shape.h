// Sizes of a feature map, and how its memory runs. No torch headers.
#pragma once
#include <cstdint>

namespace interflow {

// Sizes of u, and how memory runs: along C (NHWC, by the rule of feature_map.h) or, as all other strides are taken, along W (NCHW).
struct MapShape {
  int64_t batch, channels, height, width;
  bool channels_last;
  int64_t pixels() const { return height * width; }
};

// A map [B, C, H, W] that is read, wherever its elements lie.
struct StridedMap {
  const void* data;                                // null: there is none
  int64_t stride_b, stride_c, stride_h, stride_w;  // in elements
  const void* end;                                 // behind its last element: reads up to here are safe
};

}  // namespace interflow
