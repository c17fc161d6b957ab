// How the work on a map is cut into units, whatever is done to it. Host code without torch or CUDA headers, so that _C shows it to tests.
//
// A map is cut into pieces: NHWC: a position (a pixel, or a window of several) by some channels; NCHW: positions that follow each other. A unit is what
// a block does at a time: `part_size` positions of `slab` channels of `images` images. Bounds, vector widths and the order of sums
// depend on C, H, W, the layout and the dtype only: never on B, the grid or an address.
#pragma once
#include <algorithm>

#include "common/dtype.h"
#include "common/map_shape.h"

namespace interflow {

constexpr int kMapThreads = 256;
constexpr int64_t kMostMapPixels = int64_t(1) << 30;

// n / divisor for 0 <= n < 2^31 without a division.
struct Divider {
  uint32_t divisor, multiplier, shift;
};

struct MapPlan {
  MapShape shape;
  DType dtype;          // of maps
  int32_t slab;         // channels of a unit
  int32_t images;       // images of a unit: several where NHWC maps are small
  int32_t lanes;        // threads that share the positions of one image and vector of channels (NCHW: of one plane)
  int32_t positions;    // of one image: pixels, or what is done at a time instead
  int32_t part_size;    // positions of a unit
  int32_t parts, slabs;
  Divider by_parts, by_slabs;
  uint32_t units;
  Divider row;          // positions of a row, or elements
  float pixels, mean;   // H W and 1 / (H W)
};

namespace map_planning {

constexpr int64_t kManyParts = 32;  // more units than this
constexpr int64_t kMostParts = 1024;
constexpr int64_t kMostSteps = 8;   // of a thread in a unit

inline Divider divider(int64_t divisor) {
  uint32_t shift = 0;
  while (int64_t(1) << shift < divisor) ++shift;
  uint64_t one = 1;
  return {uint32_t(divisor), uint32_t(((one << 32) * ((one << shift) - uint64_t(divisor))) / uint64_t(divisor) + 1), shift};
}

inline int64_t ceil_of(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Of `positions` as many at a time as make a multiple of `grain`, about `part_size`: equal parts.
inline void cut_positions(MapPlan& plan, int64_t positions, int64_t part_size, int64_t grain) {
  int64_t grains = ceil_of(positions, grain), parts = std::min(ceil_of(positions, part_size), kMostParts), each = ceil_of(grains, parts);
  plan.positions = int32_t(positions), plan.part_size = int32_t(std::min(each * grain, positions)), plan.parts = int32_t(ceil_of(grains, each));
}

// NHWC. vector: channels of a thread; columns: vectors of a unit, at most; at_once: positions whose reads a thread begins together; least: so often
// a thread does that in a unit, at least.
struct PixelCut {
  int64_t vector, columns, at_once, least;
};

// Threads go to vectors of channels, then to positions, then to images.
inline void cut_pixels(MapPlan& plan, const PixelCut& cut, int64_t positions, int64_t row) {
  int64_t vectors = ceil_of(plan.shape.channels, cut.vector), columns = ceil_of(vectors, ceil_of(vectors, cut.columns));
  int64_t lanes = std::min(positions, kMapThreads / columns), images = std::max<int64_t>(1, kMapThreads / (columns * lanes)), step = lanes * cut.at_once;
  cut_positions(plan, positions, step * std::clamp(positions / (step * kManyParts), cut.least, kMostSteps), 1);
  plan.slab = int32_t(columns * cut.vector), plan.lanes = int32_t(lanes), plan.images = plan.parts > 1 ? 1 : int32_t(images);
  plan.row = divider(row);
}

// The rest of a plan that is cut; how many units there are, which may be more than a launch takes.
inline int64_t count_units(MapPlan& plan) {
  int64_t slabs = ceil_of(plan.shape.channels, plan.slab), units = ceil_of(plan.shape.batch, plan.images) * slabs * plan.parts;
  plan.slabs = int32_t(slabs), plan.units = uint32_t(units), plan.by_slabs = divider(slabs), plan.by_parts = divider(plan.parts);
  return units;
}

}  // namespace map_planning

}  // namespace interflow
