// The race and memory checker: exact happens-before over the launch as it ran (FastTrack's rules with a barrier's short cuts).
#include "memory.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <unordered_map>

#include "runtime.h"

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;  // this library's own image, for constants
extern "C" __attribute__((visibility("hidden"))) const char _end;

namespace interflow::emulation {
namespace {

// --- sets of readers, where more than one thread has read a cell since its last write ----------------------------------------
struct Readers {
  struct Group {  // threads of one block that read at one time
    uint32_t block;
    Time time;
    uint32_t threads[32];
  };
  std::vector<Group> groups;
};
std::vector<std::unique_ptr<Readers>> reader_sets;  // of this launch: a cell's reference names the launch
size_t reader_sets_used = 0;
uint64_t launch_number = 1;

Readers* readers_of(uint64_t read) {
  if (!(read & 1) || read >> 32 != launch_number) return nullptr;
  return reader_sets[(read & 0xffffffff) >> 1].get();
}

uint64_t new_readers() {
  if (reader_sets_used == reader_sets.size()) reader_sets.push_back(std::make_unique<Readers>());
  reader_sets[reader_sets_used]->groups.clear();
  return launch_number << 32 | reader_sets_used++ << 1 | 1;
}

void add_reader(Readers& set, const Thread& t, uint64_t stamp) {
  uint32_t block = Stamp::block(stamp), thread = Stamp::thread(stamp);
  Time time = Stamp::time(stamp);
  for (size_t i = 0; i < set.groups.size(); ++i) {
    Readers::Group& g = set.groups[i];
    if (g.block != block) continue;
    if (g.time == time) return void(g.threads[thread / 32] |= 1u << thread % 32);
    // Readers before their block's last barrier are ordered before today's reader, so whoever comes after him comes after them.
    if (block == t.block->index && g.time < t.block->barrier_time) g = set.groups.back(), set.groups.pop_back(), --i;
  }
  Readers::Group g{block, time, {}};
  g.threads[thread / 32] |= 1u << thread % 32;
  set.groups.push_back(g);
}

// --- atomics -----------------------------------------------------------------------------------------------------------------
struct Word {
  Knowledge released;       // what an acquire collects here
  uint64_t plain_write = 0; // the last write before the atomics began
  struct By {
    uint64_t stamp;
    bool wrote;
  };
  std::map<uint32_t, By> by;  // the last access of each thread
};
std::unordered_map<uintptr_t, Word> words;

// --- ranges --------------------------------------------------------------------------------------------------------------------
std::vector<std::unique_ptr<Range>> ranges;  // by start
Range* last_found = nullptr;

Range* find_range(const char* p) {
  if (last_found && last_found->holds(p)) return last_found;
  for (auto& r : ranges)
    if (r->holds(p)) return last_found = r.get();
  return nullptr;
}

void split_cells(Range& r, int shift) {
  std::vector<Cell> finer(size_t(r.end - r.start + (1 << shift) - 1) >> shift);
  for (size_t i = 0; i < finer.size(); ++i) finer[i] = r.cells[i >> (r.shift - shift)];
  r.cells.swap(finer);
  r.shift = shift;
}

uint32_t position(const void* at) { return uint32_t(static_cast<const char*>(at) - &__ehdr_start); }
const void* place(uint32_t position) { return &__ehdr_start + position; }

std::string place_in(const Range& r, const char* p) { return "byte " + std::to_string(p - r.start) + " of " + r.name; }

std::string who(uint64_t stamp) { return "block " + std::to_string(Stamp::block(stamp)) + " thread " + std::to_string(Stamp::thread(stamp)); }

[[noreturn]] void race(const Thread& t, const Range& r, const char* p, const char* mine, const char* theirs, uint64_t other, const void* at,
                       uint32_t other_at) {
  bool same = Stamp::block(other) == t.block->index;
  fault(std::string(mine) + " " + place_in(r, p) + " at {}, which " + who(other) + " " + theirs + (other_at ? " at {}" : "") + ": " +
            (same ? "no barrier orders the two" : "no release and acquire order the two"),
        at, place(other_at));
}

[[noreturn]] void outside(const char* p, int64_t bytes, const char* verb, const void* at) {
  std::string text = std::string(verb) + " " + std::to_string(bytes) + " bytes outside of every tensor at {}";
  auto consider = [&, nearest = int64_t(1) << 20](const Range& r) mutable {
    int64_t beyond = p >= r.end ? p - r.end : r.start - p;
    if (beyond < 0 || beyond >= nearest || r.end == r.start) return;
    nearest = beyond;
    text = std::string(verb) + " " + std::to_string(bytes) + " bytes at {}, " + std::to_string(beyond) + " bytes " +
           (p >= r.end ? "beyond the end of " : "before the start of ") + r.name;
  };
  for (auto& r : ranges) consider(*r);
  consider(current->block->shared);
  fault(text, at);
}

// A reader of a cell with its last write; then the cell remembers him.
inline void read_cell(Thread& t, Range& r, Cell& cell, const char* p, Access access, const void* at) {
  if (cell.read == t.stamp) return;
  uint64_t write = cell.write;
  bool earlier = Stamp::time(write) < launch_began;
  if (write == 0 || (earlier && r.kind == Range::Shared)) fault("reads " + place_in(r, p) + ", never written, at {}", at);
  if (!earlier) {
    if (access == Access::Stream)
      fault("reads " + place_in(r, p) + " with load_stream, which is for what no block of the launch writes, at {}; written at {}", at, place(cell.write_at));
    if (write & 1) {
      const Word& w = words[uintptr_t(p) & ~uintptr_t(3)];
      if (w.plain_write && !ordered(t, w.plain_write)) race(t, r, p, "reads", "writes", w.plain_write, at, 0);
      for (auto& [thread, by] : w.by)
        if (by.wrote && !ordered(t, by.stamp)) race(t, r, p, "reads", "changes by an atomic", by.stamp, at, cell.write_at);
    } else if (!ordered(t, write)) {
      race(t, r, p, "reads", "writes", write, at, cell.write_at);
    }
  }
  uint64_t before = cell.read;
  cell.read_at = position(at);
  if (Readers* set = readers_of(before)) return add_reader(*set, t, t.stamp);
  if (before == 0 || (before & 1) || ordered(t, before)) return void(cell.read = t.stamp);
  cell.read = new_readers();
  Readers& set = *readers_of(cell.read);
  add_reader(set, t, before);
  add_reader(set, t, t.stamp);
}

void check_readers(Thread& t, Range& r, Cell& cell, const char* p, const char* mine, const void* at) {
  if (cell.read == 0) return;
  if (!(cell.read & 1)) {
    if (!ordered(t, cell.read)) race(t, r, p, mine, "reads", cell.read, at, cell.read_at);
    return;
  }
  Readers* set = readers_of(cell.read);
  if (!set) return;
  for (const Readers::Group& g : set->groups) {
    if (g.block == t.block->index ? g.time < t.block->barrier_time : t.knows && g.time < t.knows->before(g.block)) continue;
    for (uint32_t i = 0; i < 1024; ++i)
      if (g.threads[i / 32] >> i % 32 & 1)
        if (uint64_t stamp = Stamp::make(g.time, g.block, i); !ordered(t, stamp)) race(t, r, p, mine, "reads", stamp, at, cell.read_at);
  }
}

inline void write_cell(Thread& t, Range& r, Cell& cell, const char* p, const void* at) {
  if (cell.write == t.stamp && cell.read == 0) return;
  if (cell.write & 1) {
    if (Stamp::time(cell.write) >= launch_began)
      for (auto& [thread, by] : words[uintptr_t(p) & ~uintptr_t(3)].by)
        if (!ordered(t, by.stamp)) race(t, r, p, "writes", by.wrote ? "changes by an atomic" : "reads by an atomic", by.stamp, at, cell.write_at);
  } else if (cell.write && !ordered(t, cell.write)) {
    race(t, r, p, "writes", "writes", cell.write, at, cell.write_at);
  }
  check_readers(t, r, cell, p, "writes", at);
  cell.write = t.stamp;
  cell.read = 0;
  cell.write_at = position(at);
}

}  // namespace

void touch(const void* address, int64_t bytes, Access access, const void* at) {
  Thread& t = *current;
  const char* p = static_cast<const char*>(address);
  if (t.fiber.owns(p)) return;
  bool write = access == Access::Write;
  Range* r = t.block->shared.holds(p) ? &t.block->shared : find_range(p);
  if (!r) {
    if (!write && p >= &__ehdr_start && p + bytes <= &_end) return;
    const char* params = static_cast<const char*>(launched.params);
    if (!write && p >= params && p + bytes <= params + launched.params_bytes) return;
    outside(p, bytes, write ? "writes" : "reads", at);
  }
  idle_rounds = 0;
  if (p + bytes > r->end)
    fault(std::string(write ? "writes " : "reads ") + std::to_string(bytes) + " bytes at " + place_in(*r, p) + ", " + std::to_string(p + bytes - r->end) +
              " beyond its end, at {}",
          at);
#if !INTERFLOW_EMULATION_ASAN
  if (r->kind == Range::Input) {
    if (write) fault("writes " + place_in(*r, p) + ", an input, at {}", at);
  } else {
    size_t offset = size_t(p - r->start);
    while ((offset | size_t(bytes)) & ((size_t(1) << r->shift) - 1)) split_cells(*r, r->shift - 1);
    size_t first = offset >> r->shift, last = (offset + size_t(bytes) - 1) >> r->shift;
    for (size_t i = first; i <= last; ++i) {
      if (write)
        write_cell(t, *r, r->cells[i], r->start + (i << r->shift), at);
      else
        read_cell(t, *r, r->cells[i], r->start + (i << r->shift), access, at);
    }
  }
#endif
  if (--accesses_left < 0) interrupt();
}

void check_aligned(const void* p, int64_t to, const char* what, const void* at) {
  if (uintptr_t(p) % uintptr_t(to) == 0) return;
  Range* r = current->block->shared.holds(p) ? &current->block->shared : find_range(static_cast<const char*>(p));
  fault(std::string(what) + " of " + std::to_string(to) + " bytes at " + (r ? place_in(*r, static_cast<const char*>(p)) : "an address outside") +
            ", which is not aligned to " + std::to_string(to) + ", at {}",
        at);
}

void forget_written(void* p, int64_t bytes, const void* at) {
  Range& r = current->block->shared;
  if (!r.holds(p)) fault("copies to " + std::to_string(bytes) + " bytes outside of shared memory at {}", at);
#if !INTERFLOW_EMULATION_ASAN
  for (size_t i = size_t(static_cast<char*>(p) - r.start) >> r.shift; r.start + (i << r.shift) < static_cast<char*>(p) + bytes; ++i) r.cells[i].write = 0;
#endif
  std::memset(p, 0xff, size_t(bytes));
}

void touch_atomic(const uint32_t* word, bool reads, bool writes, Order order, const void* at) {
  Thread& t = *current;
  const char* p = reinterpret_cast<const char*>(word);
  if (writes) idle_rounds = 0;
  if (draw(2) == 0) pass_on();
  check_aligned(p, 4, "an atomic access", at);
  Range* r = t.block->shared.holds(p) ? &t.block->shared : find_range(p);
  if (!r || p + 4 > r->end) outside(p, 4, "makes an atomic access of", at);
  if (writes && r->kind == Range::Input) fault("changes " + place_in(*r, p) + ", an input, by an atomic at {}", at);
  Word& w = words[uintptr_t(p)];
#if !INTERFLOW_EMULATION_ASAN
  if (r->kind != Range::Input) {
    while (size_t(p - r->start) & ((size_t(1) << r->shift) - 1)) split_cells(*r, r->shift - 1);
    for (const char* q = p; q < p + 4; q += size_t(1) << r->shift) {
      Cell& cell = r->cells[size_t(q - r->start) >> r->shift];
      bool earlier = Stamp::time(cell.write) < launch_began;
      if (reads && (cell.write == 0 || (earlier && r->kind == Range::Shared))) fault("reads " + place_in(*r, q) + ", never written, by an atomic at {}", at);
      if (!(cell.write & 1) || earlier) {
        w.plain_write = earlier ? 0 : cell.write;
        w.by.clear();
      }
      if (w.plain_write && !ordered(t, w.plain_write)) race(t, *r, q, "makes an atomic access of", "writes", w.plain_write, at, cell.write_at);
      if (writes) {
        check_readers(t, *r, cell, q, "changes by an atomic", at);
        cell.read = 0;
      }
      cell.write = t.stamp | 1;
      cell.write_at = position(at);
    }
    Word::By& by = w.by[global_thread(t.block->index, t.index)];
    by = {t.stamp, writes || (by.wrote && by.stamp == t.stamp)};
  }
#endif
  bool acquires = order == Order::Acquire || order == Order::AcqRel, releases = order == Order::Release || order == Order::AcqRel;
  if (reads && w.released) {
    Knowledge& into = acquires ? t.knows : t.unfenced;
    into = joined(into, w.released);
  }
  if (writes) {
    Knowledge mine = releases ? published(t) : t.fenced;
    w.released = reads ? joined(w.released, mine) : mine;  // a plain store ends what releases before it began
  }
}

void forget_atomics() {
  words.clear();
  reader_sets_used = 0;
  ++launch_number;
}

void forget_ranges() {
  ranges.clear();
  last_found = nullptr;
}

bool known(const void* p) { return find_range(static_cast<const char*>(p)) != nullptr; }

void add_range(Range::Kind kind, const void* start, int64_t bytes, const std::string& name, bool written) {
  if (bytes == 0) return;
  const char* from = static_cast<const char*>(start);
  const char* to = from + bytes;
  last_found = nullptr;
  if (kind == Range::Input) {
    for (auto& r : ranges)
      if (r->start <= from && to <= r->end) return;
    for (auto& r : ranges)  // slices of one tensor
      if (r->kind == Range::Input && r->start < to && from < r->end) from = std::min(from, r->start), to = std::max(to, r->end);
  }
  std::erase_if(ranges, [&](auto& r) { return r->start < to && from < r->end; });
  auto range = std::make_unique<Range>();
  range->kind = kind, range->start = from, range->end = to, range->name = name;
  if (kind == Range::Output) range->cells.assign(size_t(bytes + 3) >> 2, Cell{written ? Stamp::make(1, 0, 0) : 0, 0, 0, 0});
  ranges.push_back(std::move(range));
}

void begin_shared(Range& range, unsigned char* start, int64_t bytes, bool first) {
  range.kind = Range::Shared, range.name = "shared memory";
  range.start = reinterpret_cast<const char*>(start), range.end = range.start + bytes;
  size_t cells = size_t(bytes + (1 << range.shift) - 1) >> range.shift;
  if (range.cells.size() < cells) range.cells.resize(cells);
  if (!first) std::fill(range.cells.begin(), range.cells.end(), Cell{});  // else stamps of earlier launches tell that nothing is written
  std::memset(start, 0xff, size_t(bytes));
}

}  // namespace interflow::emulation
