// How the stage tap's work is cut into units, for all kernels of a shape. Host code without torch or CUDA headers, so that _C shows it to tests.
//
// A map is cut into pieces: NHWC: a window (or a pixel, where only the mean is taken) by tap_vector() channels; NCHW: a tile of
// tap_vector() / 2 windows that follow each other, as the mask's bytes do (or eight elements that follow each other). A unit is what a
// block does at a time: `part_size` positions of `slab` channels of `images` images. Bounds, vector widths and the order of sums
// depend on C, H, W, the layout and the dtype only: never on B, the grid or an address.
#pragma once
#include <algorithm>

#include "common/cuda/map_plan.h"
#include "stage_tap/contract.h"

namespace interflow {

// Elements of a thread's piece: 16 bytes, or what fills a byte of the mask.
constexpr int tap_vector(DType dtype, bool max_pool) { return max_pool ? int(16 / element_size(dtype)) : 8; }

// What a unit of u may take of a block's shared memory. With m, the mask, dp and sums that makes up to 49 KB: two blocks have 100 KB, three 164.
constexpr int64_t kTapStagedBytes = 28 << 10;

// Elements of one unit, at most, and of every part of a plane but its last.
struct TapRuns {
  int32_t u, m, mask;
};

struct TapPlan : MapPlan {
  bool max_pool;
  TapRuns staged;  // NCHW units that fit into shared memory; else zeros
};

namespace tap_planning {

using namespace map_planning;

constexpr int64_t kVectorsAtOnce = 64;  // of channels, NHWC: 1 KB of a pixel
constexpr int64_t kSteps = 4;           // positions that a thread takes from a unit, 64 bytes each, at least
constexpr int64_t kPlaneSteps = 16;     // NCHW, tiles of a thread: from there on a plane is cut
constexpr int64_t kUnitCost = 5;        // staged: of barriers, copies and sums
constexpr int64_t kMostRounds = 4;      // planes that follow each other in a thread

// As cut_pixels() has it.
inline void cut_tap_pixels(TapPlan& plan) {
  TapShape s{plan.shape};
  if (plan.max_pool)
    cut_pixels(plan, {tap_vector(plan.dtype, true), kVectorsAtOnce, 1, kSteps}, s.windows_h() * s.windows_w(), s.windows_w());
  else  // the mean alone is taken of small maps
    cut_pixels(plan, {tap_vector(plan.dtype, false), kVectorsAtOnce, 4, kSteps / 2}, s.pixels(), s.width);
}

// As many threads for a plane as leave few of them idle.
inline void cut_planes(TapPlan& plan) {
  TapShape s{plan.shape};
  int64_t size = element_size(plan.dtype), vector = tap_vector(plan.dtype, plan.max_pool), grain = plan.max_pool ? vector / 2 : 1;  // of positions, a piece
  int64_t positions = plan.max_pool ? s.windows_h() * s.windows_w() : ceil_of(s.pixels(), vector), pieces = ceil_of(positions, grain);
  int64_t plane_bytes = s.pixels() * size, row_bytes = plan.max_pool ? 2 * s.width * size : vector * size;
  bool ragged = (plan.max_pool ? s.width : s.pixels()) % vector;
  int64_t slab = 1, lanes = kMapThreads, part_size = positions;
  if (ragged && plane_bytes <= kTapStagedBytes) {
    // Whole planes, the most for what a unit costs, in thirds of a thread's step
    for (int64_t steps = 1, best = 0, best_of = 1; steps <= kPlaneSteps; ++steps) {
      int64_t threads = ceil_of(pieces, steps), most = kTapStagedBytes / plane_bytes;
      if (threads > kMapThreads) continue;
      int64_t planes = std::min(kMapThreads / threads, most), slabs = ceil_of(s.channels, planes * std::min(most / planes, kMostRounds));
      int64_t each = ceil_of(s.channels, slabs), cost = kUnitCost + ceil_of(each, planes) * (3 * steps + 1);
      if (each * best_of <= best * cost) continue;
      best = slab = each, best_of = cost, lanes = threads;
    }
  } else if (ragged && row_bytes <= kTapStagedBytes) {
    // Parts of whole pairs of rows
    part_size = kTapStagedBytes / row_bytes * (grain = plan.max_pool ? s.windows_w() : 1);
  } else {
    for (; lanes > 1; lanes /= 2)
      if (pieces >= 2 * lanes && pieces * 8 >= ceil_of(pieces, lanes) * lanes * 7) break;
    slab = kMapThreads / lanes;
    if (lanes == kMapThreads) part_size = lanes * kPlaneSteps * grain;
  }
  cut_positions(plan, positions, part_size, grain);
  plan.slab = int32_t(slab), plan.lanes = int32_t(lanes), plan.images = 1;
  plan.row = divider(plan.max_pool ? s.windows_w() : s.width);

  // What a unit's planes, or its part of one, take at most
  int64_t planes = std::min(slab, s.channels), u = s.pixels() * planes, mask = positions * planes;
  int64_t m = plan.max_pool ? (s.height / 2) * (s.width / 2) * planes : 0;
  if (plan.parts > 1) {
    int64_t pairs = plan.part_size / s.windows_w();
    u = plan.max_pool ? pairs * 2 * s.width : plan.part_size * vector, m = plan.max_pool ? pairs * (s.width / 2) : 0, mask = plan.part_size;
  }
  if (u * size <= kTapStagedBytes && (ragged || plan.parts == 1)) plan.staged = {int32_t(u), int32_t(m), int32_t(mask)};
}

}  // namespace tap_planning

// The plan of a map of at most kMostMapPixels pixels, rows and columns; units: how many, which may be more than a launch takes.
inline TapPlan plan_tap(const TapShape& s, DType dtype, bool max_pool, int64_t& units) {
  using namespace tap_planning;
  TapPlan plan{};
  plan.shape = s, plan.dtype = dtype, plan.max_pool = max_pool;
  units = 0;
  if (s.batch == 0 || s.channels == 0) return plan;
  plan.pixels = float(s.pixels()), plan.mean = float(1.0 / double(s.pixels()));
  if (s.channels_last)
    cut_tap_pixels(plan);
  else
    cut_planes(plan);
  units = count_units(plan);
  return plan;
}

}  // namespace interflow
