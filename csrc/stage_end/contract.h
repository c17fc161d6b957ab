// The stage end's contract between host code and kernels. No torch headers.
//
//   v = act((u + shift) + residual)   [B, C, H, W]   each step rounded to u's dtype; act is relu, or nothing
//   p = mean of v over H, W           [B, C]
//   d = dv + dp / (H * W)             where v passes, else 0
//   du = d, rounded once              dshift = sum of d over B, H, W       the residual's gradient is du
//
// v passes where not v <= 0 (so NaN does), and everywhere without relu. What is missing is -0, which changes no number. v and du come in
// u's memory format: channels_last by the rule of common/feature_map.h, else contiguous.
//
// B batch, C, H, W channels, height, width. Acc is double for fp64, else float.
#pragma once
#include <cstdint>

#include "common/dtype.h"
#include "common/map_shape.h"
