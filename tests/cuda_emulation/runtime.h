// What the parts of the emulation share: threads, blocks, the launch that runs, and how a fault ends it.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "clocks.h"
#include "control.h"
#include "fibers.h"
#include "memory.h"

namespace interflow::emulation {

constexpr int kWarpLanes = 32;
constexpr int kLaneBytes = 32;

enum class State : uint8_t { Ready, AtBarrier, AtWarp, Done };
enum class WarpOp : uint8_t { None, Sync, Shuffle, Vote, Matrix };

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  uint32_t index = 0;
  State state = State::Ready;
  Time time = 0;         // of its own clock
  uint64_t stamp = 0;    // time, block and index in one, as memory cells keep them
  Knowledge knows;       // what it collected from others since the launch began
  Knowledge fenced;      // what it knew at its last __threadfence, which relaxed atomics then publish
  Knowledge unfenced;    // what relaxed atomics saw and the next __threadfence collects
  const uint32_t* polls = nullptr;  // the word that it read with load_acquire, where it waits for another value
  uint32_t polled = 0;
  const void* polls_from = nullptr;
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    const void* at;
  };
  std::vector<Copy> copies;  // begun and not waited for
  void set_time(Time t);
};

// A rendezvous of a warp's lanes. Values of two meetings are kept: a lane may enter the next one before the others have read this one.
struct Warp {
  struct Values {
    alignas(16) unsigned char at[kWarpLanes][kLaneBytes];
  };
  WarpOp op = WarpOp::None;
  uint32_t arrived = 0, lanes = 0, gone = 0;  // bits; gone: returned
  uint32_t meeting = 0;
  int first = 0;  // the lane that came first
  Values values[2];
};

struct Block {
  uint32_t index = 0;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Warp> warps;
  std::vector<uint32_t> ready;
  bool runnable = false;
  int alive = 0;
  int waiting = 0;  // at the barrier
  int votes[2] = {0, 0};
  uint32_t barriers = 0;
  const char* barrier_file = nullptr;
  int barrier_line = 0;
  uint32_t first_waiting = 0;
  Time barrier_time = 0;  // all that its threads did before this is known to all of them
  std::unique_ptr<unsigned char[]> shared_memory;
  Range shared;
};

// The running thread; null outside a launch. And the launch's first moment: stamps before it are ordered with everything in it.
extern Thread* current;
extern Time launch_began;
extern Launch launched;
extern uint64_t idle_rounds;  // how often threads only waited since something last happened

// True if it ran without a fault.
bool run(const Launch& launch);
// The sentence of the last fault.
const std::string& last_fault();

// Ends the launch. The sentence goes on after "block b thread t: "; {} in it stands for the source lines of `at` and `other`, in this order.
[[noreturn]] void fault(const std::string& sentence, const void* at = nullptr, const void* other = nullptr);
// The same outside a launch: for the next check_launch to say.
void set_fault(const std::string& sentence);
std::string source_line(const void* pc);

uint32_t draw(uint32_t below);
// Lets a thread of any block run, this one later.
void pass_on();
// Called now and then by plain accesses.
void interrupt();
extern int accesses_left;
// The running thread only waited: a deadlock if nobody does anything else for long.
void idle();

bool ordered(const Thread& t, uint64_t stamp);
Knowledge published(Thread& t);

// Waits until every lane has come with the same operation; then the lanes' values are there for reading.
const Warp::Values& meet(WarpOp op, uint32_t mask, const void* mine, int bytes, const void* at);

}  // namespace interflow::emulation
