// The head's schedule on a GPU: which work is whose, decided by shapes alone. Host and device code without torch or CUDA headers, so that _C
// shows it to tests.
//
// Images go in groups. A pool ticket pools one unit of one stage of a group; a tail ticket multiplies the pooled values of a group with a
// tile of classes. Tickets are drawn in order: pool(0), pool(1), tail(0), pool(2), tail(1), ..., tail(last). A tail ticket waits for pool tickets of
// its group only, which are smaller and never wait, so whoever runs makes progress, whatever else is resident: no launch can deadlock.
//
// A unit is `items` images (maps whose channels have stride 1: "pixels") or planes (all other maps) side by side, one slab of channels, one bin,
// and one part of the steps, where a step is what a thread loads at once. Neither its extent nor the order of its sums depends on the batch or on the GPU.
#pragma once
#include <cstdint>

#include "interflow_head/contract.h"

#if defined(__CUDACC__)
#define INTERFLOW_HOST_DEVICE __host__ __device__
#else
#define INTERFLOW_HOST_DEVICE
#endif

namespace interflow {

constexpr int kHeadThreads = 256;
constexpr int kTileImages = 16;     // rows of a matrix instruction
constexpr int kNarrowClasses = 8;   // classes of a tile: of the last group, so that all processors share it, and where branches are wanted
constexpr int kWideClasses = 16;    // of all other groups
constexpr int kSlabLanes = 16;      // threads side by side along channels: 256 bytes of a pixel
constexpr int kSteps = 16;          // loads a thread has in flight, and makes in a unit: 64 KB where they are of 16 bytes

// Weights larger than this are read once for 64 images instead of 16, where there are that many.
constexpr int64_t kLargeWeight = int64_t(6) << 20;
INTERFLOW_HOST_DEVICE inline int group_images(int64_t batch, int64_t weight_bytes) { return weight_bytes > kLargeWeight && batch > kTileImages ? 4 * kTileImages : kTileImages; }

INTERFLOW_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct StageSchedule {
  bool pixels;
  bool flat;          // steps follow each other at one stride
  bool vectors;       // addresses allow whole-vector loads; without it the same elements are loaded one by one
  int vector;         // elements of a step: channels of a pixel, or neighbours in a row; 1, 2, 4 or 8
  int log_vector;
  int log_lanes;      // threads side by side along channels, 1 for planes
  int log_steppers;   // threads that share an item's steps
  int parts, slabs, bins;
  int64_t channels;

  INTERFLOW_HOST_DEVICE int lanes() const { return 1 << log_lanes; }
  INTERFLOW_HOST_DEVICE int steppers() const { return 1 << log_steppers; }
  INTERFLOW_HOST_DEVICE int items() const { return kHeadThreads >> (log_lanes + log_steppers); }
  // Sums that a unit leaves for an item.
  INTERFLOW_HOST_DEVICE int log_width() const { return pixels ? log_vector + log_lanes : 0; }
  INTERFLOW_HOST_DEVICE int width() const { return 1 << log_width(); }
  INTERFLOW_HOST_DEVICE int64_t group_items(int images) const { return pixels ? images : images * channels; }
  INTERFLOW_HOST_DEVICE uint32_t blocks(int images) const { return uint32_t(ceil_div(group_items(images), items())); }
  INTERFLOW_HOST_DEVICE uint32_t units(int images) const { return blocks(images) * uint32_t(bins * parts * slabs); }
  // Places where the parts of an item meet.
  INTERFLOW_HOST_DEVICE uint32_t reductions(int images) const { return parts > 1 ? blocks(images) * uint32_t(bins * slabs) : 0; }
  // Units and reductions that must be done before the group's pooled values are.
  INTERFLOW_HOST_DEVICE uint32_t events(int images) const { return parts > 1 ? reductions(images) : units(images); }
};

// Coordinates of a unit within its stage and group; the slab runs fastest: neighbouring tickets read neighbouring memory.
struct Unit {
  int stage;
  uint32_t block, bin, part, slab;
  uint32_t reduction;  // number of its reduction among the stage's in this group
  uint32_t counter;  // and among the group's
};

struct Ticket {
  bool pool;
  uint32_t group;
  uint32_t index;  // unit of the group, or tile of classes
};

struct HeadSchedule {
  int count;           // n
  int group_images;    // images of a group: 16 or 64
  int64_t batch;
  int64_t classes;
  int wide;            // classes of a tile of any group but the last
  uint32_t groups, units, units_last, tiles, tiles_last, reductions, tickets;
  uint32_t events_full, events_last;              // units and reductions of a group that its pooled values take
  uint32_t first_unit[kMaxStages], first_unit_last[kMaxStages], first_reduction[kMaxStages];
  StageSchedule stages[kMaxStages];

  INTERFLOW_HOST_DEVICE int images(uint32_t group) const {
    int64_t left = batch - int64_t(group) * group_images;
    return left < group_images ? int(left) : group_images;
  }
  INTERFLOW_HOST_DEVICE int tile_classes(uint32_t group) const { return group + 1 == groups ? kNarrowClasses : wide; }
  INTERFLOW_HOST_DEVICE uint32_t tile_count(uint32_t group) const { return group + 1 == groups ? tiles_last : tiles; }
  INTERFLOW_HOST_DEVICE uint32_t events(uint32_t group) const { return group + 1 == groups ? events_last : events_full; }

  // Counters, zero before and after a launch: two for the launch, then for each group: events, tail tickets that waited, reductions.
  static constexpr int kNext = 0, kGone = 1;
  INTERFLOW_HOST_DEVICE int64_t done_counter(uint32_t group) const { return 2 + int64_t(group) * (2 + reductions); }
  INTERFLOW_HOST_DEVICE int64_t waited_counter(uint32_t group) const { return done_counter(group) + 1; }
  INTERFLOW_HOST_DEVICE int64_t reduction_counter(uint32_t group, uint32_t reduction) const { return done_counter(group) + 2 + reduction; }
  INTERFLOW_HOST_DEVICE int64_t counters() const { return done_counter(groups); }

  INTERFLOW_HOST_DEVICE Ticket ticket(uint32_t t) const {
    uint32_t first = groups == 1 ? units_last : units;
    if (t < first) return {true, 0, t};
    t -= first;
    if (groups == 1) return {false, 0, t};
    uint32_t period = units + tiles, middle = (groups - 2) * period;
    if (t < middle) {
      uint32_t g = t / period, r = t - g * period;
      return r < units ? Ticket{true, g + 1, r} : Ticket{false, g, r - units};
    }
    t -= middle;
    if (t < units_last) return {true, groups - 1, t};
    t -= units_last;
    if (t < tiles) return {false, groups - 2, t};
    return {false, groups - 1, t - tiles};
  }

  INTERFLOW_HOST_DEVICE Unit unit(uint32_t group, uint32_t u) const {
    const uint32_t* first = group + 1 == groups ? first_unit_last : first_unit;
    int i = 0;
    while (i + 1 < count && u >= first[i + 1]) ++i;
    const StageSchedule& s = stages[i];
    uint32_t slabs = uint32_t(s.slabs), parts = uint32_t(s.parts), bins = uint32_t(s.bins);
    u -= first[i];
    Unit unit{i, u, 0, 0, 0, 0, 0};
    if (slabs > 1) unit.block = u / slabs, unit.slab = u - unit.block * slabs;
    if (parts > 1) u = unit.block, unit.block = u / parts, unit.part = u - unit.block * parts;
    if (bins > 1) u = unit.block, unit.block = u / bins, unit.bin = u - unit.block * bins;
    unit.reduction = (unit.block * bins + unit.bin) * slabs + unit.slab;
    unit.counter = first_reduction[i] + unit.reduction;
    return unit;
  }
};

// --- planning, on the host ---------------------------------------------------------------------------------------------------

// Window of a bin in one dimension: [begin, end), as adaptive average pooling has it.
INTERFLOW_HOST_DEVICE inline int64_t window_begin(int64_t bin, int64_t bins, int64_t size) { return bin * size / bins; }
INTERFLOW_HOST_DEVICE inline int64_t window_end(int64_t bin, int64_t bins, int64_t size) { return ceil_div((bin + 1) * size, bins); }

inline int64_t widest_window(int64_t bins, int64_t size) {
  int64_t widest = 0;
  for (int64_t bin = 0; bin < bins; ++bin) {
    int64_t extent = window_end(bin, bins, size) - window_begin(bin, bins, size);
    widest = extent > widest ? extent : widest;
  }
  return widest;
}

inline int ceil_log2(int64_t x) {
  int log = 0;
  while ((int64_t(1) << log) < x) ++log;
  return log;
}

// How a map is pooled. Vectors, lanes and parts follow from shape and layout; only `vectors` looks at addresses and strides.
inline StageSchedule schedule_stage(const Stage& s) {
  StageSchedule plan{};
  int64_t element = element_size(s.dtype), bins = s.bins_h * s.bins_w, widest = int64_t(16) / element;
  plan.channels = s.channels, plan.bins = int(bins);
  plan.pixels = s.channels > 1 && s.stride_c == 1;
  // With one bin a map whose rows follow each other is one row.
  plan.flat = bins == 1 && (s.height == 1 || s.width == 1 || s.stride_h == s.width * s.stride_w);
  int64_t step_stride = s.width == 1 ? s.stride_h : s.stride_w;
  int64_t pixels = widest_window(s.bins_h, s.height) * widest_window(s.bins_w, s.width);

  int64_t along = plan.pixels ? s.channels : plan.flat && (step_stride == 1 || pixels == 1) ? pixels : 1;
  plan.vector = int(widest);
  while (along % plan.vector) plan.vector /= 2;
  plan.log_vector = ceil_log2(plan.vector);
  int64_t bytes = plan.vector * element;
  auto whole = [&](int64_t stride) { return stride * element % bytes == 0; };
  plan.vectors = reinterpret_cast<uintptr_t>(s.data) % uintptr_t(bytes) == 0 && whole(s.stride_b) && (plan.pixels ? whole(s.stride_h) && whole(s.stride_w) : whole(s.stride_c) || s.channels == 1);
  if (plan.vector == 1) plan.vectors = true;

  int64_t slots = plan.pixels ? ceil_div(s.channels, plan.vector) : 1;
  int most_lanes = plan.vector > 1 ? kSlabLanes : 2 * kSlabLanes;
  plan.log_lanes = plan.pixels ? ceil_log2(slots < most_lanes ? slots : most_lanes) : 0;
  plan.slabs = int(ceil_div(slots, plan.lanes()));
  int64_t steps = plan.pixels ? pixels : ceil_div(pixels, plan.vector);
  int most_steppers = ceil_log2(kHeadThreads) - plan.log_lanes, wanted = ceil_log2(ceil_div(steps, kSteps));
  plan.log_steppers = wanted < most_steppers ? wanted : most_steppers;
  plan.parts = int(ceil_div(steps, int64_t(plan.steppers()) * kSteps));
  if (plan.parts < 1) plan.parts = 1;
  return plan;
}

// Classes of a tile of all groups but the last. `branches`: whether branch scores are wanted or make the gates.
INTERFLOW_HOST_DEVICE constexpr int wide_classes(bool branches) { return branches ? kNarrowClasses : kWideClasses; }

// The whole schedule of a batch of at least 1; wide: as wide_classes says. False where a map's pixels or bins, a group's planes, its units or all tickets would not fit 32 bits.
inline bool schedule_head(HeadSchedule& plan, const Stage* stages, int count, int64_t batch, int64_t classes, int64_t weight_bytes, int wide) {
  plan = {};
  plan.count = count, plan.batch = batch, plan.classes = classes;
  plan.group_images = group_images(batch, weight_bytes);
  plan.wide = wide;
  int64_t groups = ceil_div(batch, plan.group_images), units = 0, units_last = 0, reductions = 0;
  int last = int(batch - (groups - 1) * plan.group_images);
  for (int i = 0; i < count; ++i) {
    if (stages[i].bins_h * stages[i].bins_w > int64_t(1) << 24) return false;
    StageSchedule& s = plan.stages[i] = schedule_stage(stages[i]);
    int64_t each = int64_t(s.bins) * s.parts * s.slabs;
    if (ceil_div(s.group_items(plan.group_images), s.items()) * each >= INT32_MAX || s.group_items(plan.group_images) >= INT32_MAX) return false;
    if (stages[i].height * stages[i].width >= INT32_MAX / 2) return false;
    plan.first_unit[i] = uint32_t(units), plan.first_unit_last[i] = uint32_t(units_last), plan.first_reduction[i] = uint32_t(reductions);
    units += ceil_div(s.group_items(plan.group_images), s.items()) * each;
    units_last += ceil_div(s.group_items(last), s.items()) * each;
    reductions += s.reductions(plan.group_images);
    plan.events_full += s.events(plan.group_images), plan.events_last += s.events(last);
  }
  int64_t tiles = ceil_div(classes, plan.wide), tiles_last = ceil_div(classes, kNarrowClasses);
  int64_t tickets = (groups - 1) * (units + tiles) + units_last + tiles_last;
  if (tickets >= INT32_MAX || reductions >= INT32_MAX) return false;
  plan.groups = uint32_t(groups), plan.units = uint32_t(units), plan.units_last = uint32_t(units_last);
  plan.tiles = uint32_t(tiles), plan.tiles_last = uint32_t(tiles_last), plan.reductions = uint32_t(reductions), plan.tickets = uint32_t(tickets);
  return true;
}

}  // namespace interflow
