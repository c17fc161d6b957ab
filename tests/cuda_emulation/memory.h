// Memory that kernels may touch: ranges with names, and for those that a launch writes a shadow that knows who accessed what last.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace interflow::emulation {

struct Cell {
  uint64_t write = 0;  // stamp; 0: never written. Lowest bit: atomics came here, look into the table of atomics
  uint64_t read = 0;   // stamp of the one reader since, or, lowest bit set, a set of readers (launch number and index); 0: none
  uint32_t write_at = 0, read_at = 0;  // source positions, as offsets into the library
};

struct Range {
  enum Kind : uint8_t { Input, Output, Shared } kind = Input;
  const char* start = nullptr;
  const char* end = nullptr;
  std::string name;
  int shift = 2;  // a cell stands for 1 << shift bytes; smaller accesses split the cells
  std::vector<Cell> cells;
  bool holds(const void* p) const { return p >= start && p < end; }
};

enum class Access : uint8_t { Read, Write, Stream };  // Stream: a read that may come from a cache that does not see this launch's writes

// One access of the running thread, or a fault.
void touch(const void* p, int64_t bytes, Access access, const void* at);
void check_aligned(const void* p, int64_t to, const char* what, const void* at);
// Of the block's shared memory, poisoned and as if nobody had written it.
void forget_written(void* p, int64_t bytes, const void* at);

enum class Order : uint8_t { Relaxed, Acquire, Release, AcqRel };
// Around an atomic access of a word; the caller reads or writes it afterwards.
void touch_atomic(const uint32_t* p, bool reads, bool writes, Order order, const void* at);
void forget_atomics();

// Ranges of the host seam. A new range replaces what it overlaps, except that an input inside a known range changes nothing.
void forget_ranges();
bool known(const void* p);
void add_range(Range::Kind kind, const void* start, int64_t bytes, const std::string& name, bool written);
// Poisoned, for a new block. first: of its launch in this slot.
void begin_shared(Range& range, unsigned char* start, int64_t bytes, bool first);

}  // namespace interflow::emulation
