// Work shared among torch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace interflow {

// Work below this many bytes runs on the calling thread: a parallel region costs more.
constexpr int64_t kSerialBytes = 1 << 15;

// Runs f(i) for i in [0, count) on all threads; results must not depend on which thread takes which i. Each takes `run`
// neighbouring indices at a time: long enough for a sequential stream through memory, short enough to even out the threads.
template <class F>
void parallel_tickets(int64_t count, bool worthwhile, int64_t longest_run, const F& f) {
  int64_t threads = worthwhile && count > 1 ? std::min<int64_t>(count, torch::stable::get_num_threads()) : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  int64_t run = std::clamp<int64_t>(count / (threads * 8), 1, longest_run);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(run, std::memory_order_relaxed)) < count;)
      for (int64_t end = std::min(i + run, count); i < end; ++i) f(i);
  });
}

}  // namespace interflow
