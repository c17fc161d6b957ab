// Runs one launch: which fiber of which block goes on, barriers, warps, deadlocks. Everything random comes from the seed.
#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <utility>

#include "runtime.h"

namespace interflow::emulation {

Thread* current = nullptr;
Time launch_began = 1;
Launch launched{};
uint64_t idle_rounds = 0;
int accesses_left = 0;

namespace {

constexpr int kAccessesAtOnce = 700;  // a thread that only computes is interrupted after half of these, on average
constexpr int kSecondsOfLaunch = 120;
constexpr int kMostShared = 227 << 10;  // of sm_90
constexpr uint64_t kWait = 200'000;     // nanoseconds that pass when a thread waits a little: a deadlock is found after some four seconds or more

struct Machine {
  Fiber outside;
  std::vector<std::unique_ptr<Block>> slots;  // kept between launches, for their stacks
  std::vector<Block*> runnable;
  std::vector<uint32_t> to_come;  // blocks that wait for a slot
  Block* refill = nullptr;  // a slot whose block has ended while others wait
  int alive = 0;            // slots at work
  Time latest = 1;
  uint64_t random = 1;
  uint64_t nanoseconds = 0;
  std::chrono::steady_clock::time_point began;
  bool faulted = false;
  std::string sentence;
  const void *at = nullptr, *other = nullptr;
} machine;

std::string last_sentence;

void entry() {
  launched.invoke(launched.call);
  finish_thread();
}

}  // namespace

uint32_t threads() { return uint32_t(launched.threads); }
uint32_t blocks() { return uint32_t(launched.blocks); }

uint32_t draw(uint32_t below) {
  uint64_t& x = machine.random;
  x ^= x << 13, x ^= x >> 7, x ^= x << 17;
  return uint32_t((x >> 32) * below >> 32);
}

void Thread::set_time(Time t) {
  time = t;
  stamp = Stamp::make(t, block->index, index);
  machine.latest = std::max(machine.latest, t);
}

const std::string& last_fault() { return last_sentence; }
void set_fault(const std::string& sentence) { last_sentence = sentence; }

void fault(const std::string& sentence, const void* at, const void* other) {
  machine.faulted = true;
  machine.sentence = "block " + std::to_string(current->block->index) + " thread " + std::to_string(current->index) + ": " + sentence;
  machine.at = at, machine.other = other;
  Fiber::go(current->fiber, machine.outside);
  __builtin_unreachable();
}

// --- which thread goes on --------------------------------------------------------------------------------------------------
namespace {

std::string where_it_waits(const Thread& t) {
  std::string text = "block " + std::to_string(t.block->index) + " thread " + std::to_string(t.index);
  if (t.state == State::AtBarrier) return text + " waits at __syncthreads of line " + std::to_string(t.block->barrier_line);
  if (t.state == State::AtWarp) return text + " waits for lanes of its warp";
  if (t.polls) return text + " waits for a word that stays " + std::to_string(t.polled) + " (" + source_line(t.polls_from) + ")";
  return text + " can go on";
}

// Named by the first waiting thread of each of the first blocks.
[[noreturn]] void deadlock() {
  std::string text = "deadlock, nobody can go on:";
  int named = 0;
  for (auto& block : machine.slots) {
    if (block->alive == 0 || named == 4) continue;
    const Thread* shown = nullptr;
    for (auto& t : block->threads)
      if (t->state != State::Done && (!shown || (t->polls && t->state == State::Ready))) shown = t.get();
    text += (named++ ? ", " : " ") + where_it_waits(*shown);
  }
  fault(text);
}

void make_ready(Thread& t) {
  t.state = State::Ready;
  t.block->ready.push_back(t.index);
  if (!t.block->runnable) t.block->runnable = true, machine.runnable.push_back(t.block);
}

Thread& take_next(bool any_block) {
  Block* block = current->block;
  if (any_block || block->ready.empty()) {
    if (machine.runnable.empty()) deadlock();
    block = machine.runnable[draw(uint32_t(machine.runnable.size()))];
  }
  uint32_t i = draw(uint32_t(block->ready.size()));
  uint32_t index = block->ready[i];
  block->ready[i] = block->ready.back();
  block->ready.pop_back();
  if (block->ready.empty()) {
    block->runnable = false;
    std::erase(machine.runnable, block);
  }
  settings.order = settings.order * 0x9e3779b97f4a7c15u + (block->index << Stamp::kThreadBits | index) + 1;
  return *block->threads[index];
}

// The running thread has said what it waits for.
void go_on(bool any_block) {
  Thread& from = *current;
  Thread& to = take_next(any_block);
  if (&to == &from) return;
  current = &to;
  Fiber::go(from.fiber, to.fiber);
}

// Hardware promises no order of blocks.
void begin_block(Block& block, bool first) {
  uint32_t next = draw(uint32_t(machine.to_come.size())), index = machine.to_come[next];
  machine.to_come[next] = machine.to_come.back();
  machine.to_come.pop_back();
  int threads = launched.threads;
  block.index = index;
  block.alive = threads, block.waiting = 0, block.barriers = 0, block.votes[0] = block.votes[1] = 0;
  block.barrier_time = launch_began;
  block.ready.clear();
  block.runnable = false;
  block.warps.resize(size_t(threads + kWarpLanes - 1) / kWarpLanes);
  while (int(block.threads.size()) < threads) block.threads.push_back(std::make_unique<Thread>());
  for (int w = 0; w < int(block.warps.size()); ++w) {
    Warp& warp = block.warps[size_t(w)];
    warp.op = WarpOp::None, warp.arrived = warp.gone = 0;
    int lanes = std::min(kWarpLanes, threads - w * kWarpLanes);
    warp.lanes = lanes == kWarpLanes ? ~0u : (1u << lanes) - 1;
  }
  begin_shared(block.shared, block.shared_memory.get(), launched.shared_bytes, first);
  for (int i = 0; i < int(block.threads.size()); ++i) {
    Thread& t = *block.threads[size_t(i)];
    t.block = &block, t.index = uint32_t(i), t.state = State::Done;
    if (i >= threads) continue;
    t.knows = t.fenced = t.unfenced = nullptr;
    t.polls = nullptr;
    t.copies.clear();
    t.set_time(launch_began);
    t.fiber.begin(entry, uint32_t(i) * 7 + index);
    make_ready(t);
  }
}

}  // namespace

void pass_on() {
  make_ready(*current);
  go_on(true);
}

void interrupt() {
  accesses_left = int(draw(kAccessesAtOnce));
  if (std::chrono::steady_clock::now() - machine.began > std::chrono::seconds(kSecondsOfLaunch))
    fault("the launch still runs after " + std::to_string(kSecondsOfLaunch) + " seconds");
  pass_on();
}

void idle() {
  if (++idle_rounds > 20000 + 64 * uint64_t(machine.alive) * uint64_t(launched.threads)) deadlock();
}

void wait_a_little() {
  machine.nanoseconds += kWait;
  idle();
  pass_on();
}

uint64_t nanoseconds() { return machine.nanoseconds; }

void give_up(const char* who, uint32_t number, const char* what, const char* expected) {
  fault(std::string(who) + ":" + std::to_string(number) + ": " + what + ": Assertion `" + expected + "` failed");
}

void finish_thread() {
  Block& block = *current->block;
  if (!current->copies.empty()) fault("returns and has not waited for the copy that it began at {}", current->copies[0].at);
  current->state = State::Done;
  current->polls = nullptr;
  idle_rounds = 0;
  if (block.waiting)
    fault("returns, while thread " + std::to_string(block.first_waiting) + " waits for it at __syncthreads of line " + std::to_string(block.barrier_line));
  Warp& warp = block.warps[current->index / kWarpLanes];
  if (warp.arrived) fault("returns, while lane " + std::to_string(warp.first) + " of its warp waits for it");
  warp.gone |= 1u << current->index % kWarpLanes;
  if (--block.alive == 0) {
    if (!machine.to_come.empty()) {
      machine.refill = &block;  // its stacks are begun anew, this one too: not from here
      Fiber::go(current->fiber, machine.outside);
    } else if (--machine.alive == 0) {
      Fiber::go(current->fiber, machine.outside);
    }
  }
  Thread& to = take_next(false);
  Fiber& from = current->fiber;
  current = &to;
  Fiber::go(from, to.fiber);
  __builtin_unreachable();
}

// --- meeting others ----------------------------------------------------------------------------------------------------------
int barrier(int vote, const char* file, int line) {
  Thread& t = *current;
  Block& block = *t.block;
  idle_rounds = 0;
  if (block.alive < launched.threads) {
    uint32_t gone = 0;
    while (block.threads[gone]->state != State::Done) ++gone;
    fault("waits at __syncthreads of line " + std::to_string(line) + ", where thread " + std::to_string(gone) + " never comes: it returned");
  }
  if (block.waiting == 0) {
    block.barrier_file = file, block.barrier_line = line, block.first_waiting = t.index;
  } else if (block.barrier_line != line || std::strcmp(block.barrier_file, file)) {
    fault("comes to __syncthreads of line " + std::to_string(line) + ", while thread " + std::to_string(block.first_waiting) + " waits at the one of line " +
          std::to_string(block.barrier_line));
  }
  int& votes = block.votes[block.barriers & 1];
  votes += vote;
  if (++block.waiting < launched.threads) {
    t.state = State::AtBarrier;
    go_on(false);
    return votes;
  }

  // Everybody learns what anybody knows
  Time latest = 0;
  Knowledge all = block.threads[0]->knows;
  const Clock* last = all.get();
  for (int i = 0; i < launched.threads; ++i) {
    Thread& other = *block.threads[size_t(i)];
    latest = std::max(latest, other.time);
    if (other.knows.get() != last) last = other.knows.get(), all = joined(all, other.knows);
  }
  if (all) {
    auto trimmed = std::make_shared<Clock>(*all);
    trimmed->forget_threads(block.index);
    all = trimmed;
  }
  block.barrier_time = latest + 1;
  block.waiting = 0;
  block.votes[++block.barriers & 1] = 0;
  for (int i = 0; i < launched.threads; ++i) {
    Thread& other = *block.threads[size_t(i)];
    other.knows = all;
    other.set_time(latest + 1);
    if (&other != &t) make_ready(other);
  }
  if (draw(4) == 0) pass_on();
  return votes;
}

const Warp::Values& meet(WarpOp op, uint32_t mask, const void* mine, int bytes, const void* at) {
  Thread& t = *current;
  Block& block = *t.block;
  Warp& warp = block.warps[t.index / kWarpLanes];
  int lane = int(t.index % kWarpLanes);
  idle_rounds = 0;
  auto name = [](WarpOp which) {
    static const char* const names[] = {"", "__syncwarp", "a shuffle", "a vote", "a matrix instruction"};
    return std::string(names[int(which)]);
  };
  if ((mask & warp.lanes) != warp.lanes) fault("calls " + name(op) + " with a mask that leaves out lanes, at {}", at);
  if (warp.gone) fault("waits in " + name(op) + " for lane " + std::to_string(std::countr_zero(warp.gone)) + " of its warp, which returned, at {}", at);
  if (warp.arrived == 0)
    warp.op = op, warp.first = lane;
  else if (warp.op != op)
    fault("comes to " + name(op) + ", while lane " + std::to_string(warp.first) + " of its warp waits in " + name(warp.op) + ", at {}", at);
  Warp::Values& values = warp.values[warp.meeting & 1];
  if (bytes) std::memcpy(values.at[lane], mine, size_t(bytes));
  warp.arrived |= 1u << lane;
  if (warp.arrived != warp.lanes) {
    t.state = State::AtWarp;
    go_on(false);
    return values;
  }

  warp.arrived = 0;
  ++warp.meeting;
  Thread* lanes[kWarpLanes];
  int count = 0;
  for (; count < std::popcount(warp.lanes); ++count) lanes[count] = block.threads[t.index / kWarpLanes * kWarpLanes + uint32_t(count)].get();
  if (op == WarpOp::Sync) {  // a shuffle orders no memory
    Knowledge all;
    for (int i = 0; i < count; ++i) all = joined(all, lanes[i]->knows);
    auto learnt = all ? std::make_shared<Clock>(*all) : std::make_shared<Clock>();
    for (int i = 0; i < count; ++i) learnt->learn_thread(global_thread(block.index, lanes[i]->index), lanes[i]->time);
    for (int i = 0; i < count; ++i) lanes[i]->knows = learnt, lanes[i]->set_time(lanes[i]->time + 1);
  }
  for (int i = 0; i < count; ++i)
    if (lanes[i] != &t) make_ready(*lanes[i]);
  return values;
}

// --- what is known ---------------------------------------------------------------------------------------------------------------
bool ordered(const Thread& t, uint64_t stamp) {
  Time time = Stamp::time(stamp);
  if (time < launch_began) return true;
  uint32_t block = Stamp::block(stamp), thread = Stamp::thread(stamp);
  if (block == t.block->index) {
    if (thread == t.index || time < t.block->barrier_time) return true;
  } else if (t.knows && time < t.knows->before(block)) {
    return true;
  }
  return t.knows && time <= t.knows->upto(global_thread(block, thread));
}

Knowledge published(Thread& t) {
  auto clock = t.knows ? std::make_shared<Clock>(*t.knows) : std::make_shared<Clock>();
  clock->learn_block(t.block->index, t.block->barrier_time);
  clock->learn_thread(global_thread(t.block->index, t.index), t.time);
  t.set_time(t.time + 1);
  return clock;
}

// --- one launch ------------------------------------------------------------------------------------------------------------------
bool run(const Launch& launch) {
  launched = launch;
  machine.faulted = false;
  machine.refill = nullptr;
  machine.random = (settings.seed + 1) * 0x9e3779b97f4a7c15u | 1;
  machine.began = std::chrono::steady_clock::now();
  launch_began = ++machine.latest;
  idle_rounds = settings.order = 0;
  settings.copies = 0;
  accesses_left = int(draw(kAccessesAtOnce));
  machine.runnable.clear();
  machine.to_come.clear();
  if (launch.shared_bytes > kMostShared) {
    set_fault("a block asks for " + std::to_string(launch.shared_bytes) + " bytes of shared memory, the most is " + std::to_string(kMostShared));
    return false;
  }
  if (launch.blocks > (1 << Stamp::kBlockBits) || launch.threads > (1 << Stamp::kThreadBits) || launch.blocks < 1 || launch.threads < 1) {
    set_fault("a launch of " + std::to_string(launch.blocks) + " blocks of " + std::to_string(launch.threads) + " threads");
    return false;
  }
  for (int64_t i = 0; i < launch.blocks; ++i) machine.to_come.push_back(uint32_t(i));
  machine.alive = int(std::min(launch.blocks, settings.blocks));
  while (int(machine.slots.size()) < machine.alive) machine.slots.push_back(std::make_unique<Block>());
  for (auto& slot : machine.slots) slot->alive = 0;
  for (int i = 0; i < machine.alive; ++i) {
    Block& block = *machine.slots[size_t(i)];
    block.shared_memory.reset(new unsigned char[size_t(launch.shared_bytes)]);
    begin_block(block, true);
  }
  do {
    if (machine.refill) begin_block(*std::exchange(machine.refill, nullptr), false);
    current = machine.runnable[0]->threads[0].get();
    current = &take_next(true);
    Fiber::go(machine.outside, current->fiber);
  } while (machine.refill);
  current = nullptr;
  forget_atomics();
  if (!machine.faulted) return true;
  std::string text = machine.sentence;
  for (const void* pc : {machine.at, machine.other})
    if (size_t hole = text.find("{}"); hole != std::string::npos) text.replace(hole, 2, source_line(pc));
  last_sentence = text;
  return false;
}

}  // namespace interflow::emulation
