// The host seam on the CPU: tensors become ranges, counters are watched, a fault becomes an error; and what Python sets.
#include <cstring>
#include <memory>

#include "common/cuda/host.h"
#include "control.h"
#include "runtime.h"

namespace interflow {
namespace {

int calls = 0;  // operators at work: one, or more where one calls another
std::unique_ptr<uint32_t[]> counter_words;
int64_t counter_capacity = 0, counter_count = 0;

std::string describe(const char* role, const Tensor& t) {
  return std::string(role) + " " + shape_text(t) + " of " + torch::headeronly::toString(t.scalar_type());
}

// From the first to the last element.
int64_t extent(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) {
    if (t.size(i) == 0) return 0;
    last += (t.size(i) - 1) * t.stride(i);
  }
  return (last + 1) * int64_t(t.element_size());
}

}  // namespace

OnDevice::OnDevice(const Tensor&) {
  if (calls++ == 0) emulation::forget_ranges();
}
OnDevice::~OnDevice() {
  if (--calls == 0) emulation::forget_ranges(), counter_count = 0;
}

void note_unwritten(const Tensor& t) {
  int64_t bytes = extent(t);
  if (calls == 0 || bytes == 0) return;
  std::memset(t.mutable_data_ptr(), 0xff, size_t(bytes));
  emulation::add_range(emulation::Range::Output, t.const_data_ptr(), bytes, describe("output or workspace", t), false);
}

const void* readable(const Tensor& t) {
  emulation::add_range(emulation::Range::Input, t.const_data_ptr(), extent(t), describe("input", t), true);
  return t.const_data_ptr();
}

void* writable(const Tensor& t) {
  if (!emulation::known(t.const_data_ptr())) emulation::add_range(emulation::Range::Output, t.const_data_ptr(), extent(t), describe("tensor", t), true);
  return t.mutable_data_ptr();
}

uint32_t* counters(int, cudaStream_t, int64_t count) {
  if (count > counter_capacity) {
    counter_capacity = count;
    counter_words.reset(new uint32_t[size_t(count)]());
  }
  counter_count = count;
  emulation::add_range(emulation::Range::Output, counter_words.get(), 4 * count, "counters", true);
  return counter_words.get();
}

void check_launch(cudaError_t error, const char* op, const char* kernel) {
  INTERFLOW_CHECK(error == cudaSuccess, op, ": ", kernel, ": ", emulation::last_fault());
}

namespace emulation {

bool launch_kernel(const Launch& launch) {
  bool good = run(launch);
  for (int64_t i = 0; i < counter_count; ++i) {
    if (good && counter_words[size_t(i)]) {
      set_fault("counter " + std::to_string(i) + " is " + std::to_string(counter_words[size_t(i)]) + " after the launch, and must be zero again");
      good = false;
    }
    counter_words[size_t(i)] = 0;
  }
  return good;
}

}  // namespace emulation
}  // namespace interflow

extern "C" __attribute__((visibility("default"))) void interflow_emulation_set(int64_t blocks, uint64_t seed) {
  interflow::emulation::settings.blocks = blocks;
  interflow::emulation::settings.seed = seed;
}
extern "C" __attribute__((visibility("default"))) uint64_t interflow_emulation_order() { return interflow::emulation::settings.order; }
extern "C" __attribute__((visibility("default"))) int64_t interflow_emulation_copies() { return interflow::emulation::settings.copies; }
extern "C" __attribute__((visibility("default"))) int64_t interflow_emulation_shared_bytes() { return interflow::emulation::launched.shared_bytes; }
