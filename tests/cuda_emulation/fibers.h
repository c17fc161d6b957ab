// Switching between stacks on one OS thread: a few instructions instead of swapcontext's two system calls.
#pragma once
#include <cstddef>

namespace interflow::emulation {

class Fiber {
 public:
  static constexpr size_t kStackBytes = size_t(INTERFLOW_EMULATION_ASAN ? 256 : 64) << 10;

  // The next switch to it calls entry(), which must not return. `color` shifts the stack's start, so that not all begin in one cache set.
  void begin(void (*entry)(), unsigned color);
  // Leaves `from`, which a later switch continues.
  static void go(Fiber& from, Fiber& to);

  bool owns(const void* p) const { return size_t(static_cast<const char*>(p) - stack_) < kStackBytes; }

  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber();

 private:
  char* stack_ = nullptr;  // null: the OS thread's own
  void* saved_ = nullptr;  // the stack pointer, or a ucontext_t
#if INTERFLOW_EMULATION_ASAN
  static void arrived();
  void (*entry_)() = nullptr;
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

}  // namespace interflow::emulation
