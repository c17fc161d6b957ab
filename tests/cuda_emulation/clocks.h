// Vector clocks: what one emulated thread knows of the others, exact, and small because a barrier orders a whole block.
//
// Every thread counts its own time, which moves on where it publishes something: at a barrier (all threads of the block to the same, later
// time), at __syncwarp and at a release. A clock says, for a block, before which time everything is known (from its barriers), and for a
// single thread up to which time it is known (what it did since then). Threads that learnt the same share one clock.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace interflow::emulation {

using Time = uint64_t;

// Who accessed a memory cell last and when; 0: nobody. The lowest bit is the cell's own.
struct Stamp {
  static constexpr int kThreadBits = 10, kBlockBits = 16;
  static uint64_t make(Time time, uint32_t block, uint32_t thread) { return time << 27 | uint64_t(block) << 11 | thread << 1; }
  static Time time(uint64_t stamp) { return stamp >> 27; }
  static uint32_t block(uint64_t stamp) { return uint32_t(stamp >> 11) & 0xffff; }
  static uint32_t thread(uint64_t stamp) { return uint32_t(stamp >> 1) & 0x3ff; }
};

inline uint32_t global_thread(uint32_t block, uint32_t thread) { return block << Stamp::kThreadBits | thread; }

class Clock {
 public:
  // Everything that the block did before this time is known.
  Time before(uint32_t block) const { return find(blocks_, block); }
  // What the thread did up to and including this time is known.
  Time upto(uint32_t thread) const { return find(threads_, thread); }

  void learn_block(uint32_t block, Time time) { raise(blocks_, block, time); }
  void learn_thread(uint32_t thread, Time time) { raise(threads_, thread, time); }
  void learn(const Clock& other) {
    merge(blocks_, other.blocks_);
    merge(threads_, other.threads_);
  }
  // Single threads of a block whose barrier covers them by now.
  void forget_threads(uint32_t block) {
    std::erase_if(threads_, [&](const Entry& e) { return e.first >> Stamp::kThreadBits == block; });
  }

 private:
  using Entry = std::pair<uint32_t, Time>;
  using Entries = std::vector<Entry>;  // sorted by block or thread
  static Time find(const Entries& entries, uint32_t key) {
    auto at = std::lower_bound(entries.begin(), entries.end(), Entry(key, 0));
    return at != entries.end() && at->first == key ? at->second : 0;
  }
  static void raise(Entries& entries, uint32_t key, Time time) {
    auto at = std::lower_bound(entries.begin(), entries.end(), Entry(key, 0));
    if (at == entries.end() || at->first != key)
      entries.insert(at, {key, time});
    else
      at->second = std::max(at->second, time);
  }
  static void merge(Entries& into, const Entries& from) {
    if (from.empty()) return;
    if (into.empty()) return void(into = from);
    Entries merged;
    merged.reserve(into.size() + from.size());
    for (size_t i = 0, j = 0; i < into.size() || j < from.size();) {
      if (j == from.size() || (i < into.size() && into[i].first < from[j].first))
        merged.push_back(into[i++]);
      else if (i == into.size() || from[j].first < into[i].first)
        merged.push_back(from[j++]);
      else
        merged.push_back({into[i].first, std::max(into[i].second, from[j].second)}), ++i, ++j;
    }
    into.swap(merged);
  }

  Entries blocks_, threads_;
};

using Knowledge = std::shared_ptr<const Clock>;  // null: nothing

inline Knowledge joined(const Knowledge& a, const Knowledge& b) {
  if (a == b || !b) return a;
  if (!a) return b;
  auto both = std::make_shared<Clock>(*a);
  both->learn(*b);
  return both;
}

}  // namespace interflow::emulation
