// How the stage end's work is cut into units, for all kernels of a shape. Host code without torch or CUDA headers, so that _C shows it to tests.
//
// NHWC: a thread takes 16 bytes of channels of a pixel. NCHW: the planes of an image are one run of elements, cut into chunks of 16 bytes; a unit is
// some whole planes that begin with a chunk, or a part of a large one. A chunk may hold the end of one plane and the beginning of the next: it
// leaves a sum of each. So 49 or 196 elements a plane are read and written 16 bytes at a time, straight from and to global memory.
#pragma once
#include <numeric>

#include "common/cuda/map_plan.h"
#include "stage_end/contract.h"

namespace interflow {

// Elements of a chunk: 16 bytes.
constexpr int end_vector(DType dtype) { return int(16 / element_size(dtype)); }

struct EndPlan : MapPlan {
  Divider plane;    // NCHW: elements of a plane
  int32_t slots;    // NCHW: sums that a chunk leaves: 2, or one of each element where a plane is smaller than a chunk; 1: each thread leaves one,
                    // the unit being of one plane
  int32_t most;     // NCHW: sums of a plane in a unit, at most
  int32_t numbers;  // NCHW: sums that a unit leaves, at most
  bool whole;       // all units are whole chunks
};

namespace end_planning {

using namespace map_planning;

constexpr int64_t kEndAtOnce = 4;              // chunks whose reads a thread begins together
constexpr int64_t kChunks = kMapThreads * 4;   // of a unit where planes are small
constexpr int64_t kMostChunks = 2 * kChunks;   // of a whole plane: larger ones are cut
constexpr int64_t kMostTogether = 6 * kChunks; // of planes that fill whole chunks only several together: 48 KB of sums
constexpr PixelCut kPixels{0, 32, kEndAtOnce, 2};

inline void cut_end_planes(EndPlan& plan) {
  const MapShape& s = plan.shape;
  int64_t vector = end_vector(plan.dtype), pixels = s.pixels(), grain = vector / std::gcd(pixels, vector);  // planes that fill whole chunks
  bool tiny = pixels < vector;
  int64_t chunks = tiny ? kMapThreads : kChunks, together = ceil_of(grain * pixels, vector);  // of those planes
  int64_t slab = 1, part_size = pixels, part_grain = 1;
  if (together <= (grain == 1 ? kMostChunks : kMostTogether)) {
    int64_t grains = std::max<int64_t>(1, chunks / together), slabs = ceil_of(s.channels, grains * grain);
    slab = ceil_of(ceil_of(s.channels, slabs), grain) * grain;
  } else {
    part_size = kChunks * vector, part_grain = vector;
  }
  cut_positions(plan, pixels, part_size, part_grain);
  plan.slab = int32_t(slab), plan.lanes = kMapThreads, plan.images = 1;
  plan.row = divider(s.width), plan.plane = divider(pixels);

  // What a unit holds at most
  if (slab == 1) {
    plan.slots = 1, plan.most = plan.numbers = kMapThreads;
  } else {
    plan.slots = tiny ? int32_t(vector) : 2, plan.numbers = int32_t(ceil_of(std::min(slab, s.channels) * pixels, vector) * plan.slots);
    plan.most = int32_t(tiny ? pixels : grain == 1 ? pixels / vector : (pixels + vector - 2) / vector + 1);
  }
  plan.whole = s.channels * pixels % vector == 0 && (slab * pixels % vector == 0 || slab >= s.channels) && !tiny;
}

}  // namespace end_planning

// The plan of a map of at most kMostMapPixels pixels, rows and columns; units: how many, which may be more than a launch takes.
inline EndPlan plan_end(const MapShape& s, DType dtype, int64_t& units) {
  using namespace end_planning;
  EndPlan plan{};
  plan.shape = s, plan.dtype = dtype;
  units = 0;
  if (s.batch == 0 || s.channels == 0) return plan;
  plan.pixels = float(s.pixels()), plan.mean = float(1.0 / double(s.pixels()));
  if (s.channels_last) {
    PixelCut cut = kPixels;
    cut.vector = end_vector(dtype);
    cut_pixels(plan, cut, s.pixels(), s.width);
    plan.whole = s.channels % end_vector(dtype) == 0;
  } else {
    cut_end_planes(plan);
  }
  units = count_units(plan);
  return plan;
}

}  // namespace interflow
