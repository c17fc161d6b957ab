// The entry points that g++ -fsanitize=thread calls before every access to memory, in place of ThreadSanitizer's own library; and the
// twins' accesses. Compiled without the sanitizer.
#include <cstring>

#include "control.h"
#include "runtime.h"

using namespace interflow::emulation;

#define HOOK extern "C" __attribute__((visibility("hidden"), used))
#define HERE __builtin_return_address(0)

#define ACCESS(size)                                                                                   \
  HOOK void __tsan_read##size(void* p) {                                                               \
    if (current && !current->fiber.owns(p)) {                                                          \
      if (size > 1) check_aligned(p, size, "a read", HERE);                                            \
      touch(p, size, Access::Read, HERE);                                                              \
    }                                                                                                  \
  }                                                                                                    \
  HOOK void __tsan_write##size(void* p) {                                                              \
    if (current && !current->fiber.owns(p)) {                                                          \
      if (size > 1) check_aligned(p, size, "a write", HERE);                                           \
      touch(p, size, Access::Write, HERE);                                                             \
    }                                                                                                  \
  }                                                                                                    \
  HOOK void __tsan_unaligned_read##size(void* p) { if (current) touch(p, size, Access::Read, HERE); }  \
  HOOK void __tsan_unaligned_write##size(void* p) { if (current) touch(p, size, Access::Write, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
#undef ACCESS

HOOK void __tsan_read_range(void* p, size_t bytes) { if (current && bytes) touch(p, int64_t(bytes), Access::Read, HERE); }
HOOK void __tsan_write_range(void* p, size_t bytes) { if (current && bytes) touch(p, int64_t(bytes), Access::Write, HERE); }
HOOK void __tsan_vptr_update(void*, void*) {}
HOOK void __tsan_vptr_read(void*) {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_init() {}

// Copies that the compiler leaves to the library; in the kernels' object files these take memcpy's, memmove's and memset's place.
HOOK void* interflow_checked_memcpy(void* to, const void* from, size_t bytes) {
  if (current && bytes) touch(from, int64_t(bytes), Access::Read, HERE), touch(to, int64_t(bytes), Access::Write, HERE);
  return std::memcpy(to, from, bytes);
}
HOOK void* interflow_checked_memmove(void* to, const void* from, size_t bytes) {
  if (current && bytes) touch(from, int64_t(bytes), Access::Read, HERE), touch(to, int64_t(bytes), Access::Write, HERE);
  return std::memmove(to, from, bytes);
}
HOOK void* interflow_checked_memset(void* to, int value, size_t bytes) {
  if (current && bytes) touch(to, int64_t(bytes), Access::Write, HERE);
  return std::memset(to, value, bytes);
}

namespace interflow::emulation {

Settings settings;

uint32_t thread_index() { return current->index; }
uint32_t block_index() { return current->block->index; }
unsigned char* shared_memory() { return current->block->shared_memory.get(); }

void load(void* value, const void* p, int bytes, Cached cached) {
  if (bytes > 1) check_aligned(p, bytes, "a read", HERE);
  touch(p, bytes, cached == Cached::Stream ? Access::Stream : Access::Read, HERE);
  std::memcpy(value, p, size_t(bytes));
}
void store(void* p, const void* value, int bytes) {
  if (bytes > 1) check_aligned(p, bytes, "a write", HERE);
  touch(p, bytes, Access::Write, HERE);
  std::memcpy(p, value, size_t(bytes));
}

// Writing is checked twice: the memory is no longer read by anybody when the copy begins, and nobody has touched it when it ends.
void copy_async(void* to, const void* from, int bytes) {
  check_aligned(from, bytes, "an asynchronous copy", HERE);
  check_aligned(to, bytes, "an asynchronous copy", HERE);
  touch(from, bytes, Access::Stream, HERE);
  touch(to, bytes, Access::Write, HERE);
  forget_written(to, bytes, HERE);
  current->copies.push_back({to, from, bytes, HERE});
  ++settings.copies;
}
void wait_for_copies() {
  for (const Thread::Copy& copy : current->copies) {
    touch(copy.to, copy.bytes, Access::Write, copy.at);
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
  }
  current->copies.clear();
}

namespace {
Order order(bool acquire, bool release) { return acquire ? release ? Order::AcqRel : Order::Acquire : release ? Order::Release : Order::Relaxed; }
}  // namespace

uint32_t atomic_add(uint32_t* p, uint32_t add, bool acquire, bool release) {
  touch_atomic(p, true, true, order(acquire, release), HERE);
  uint32_t before = *p;
  *p += add;
  return before;
}
uint32_t atomic_exchange(uint32_t* p, uint32_t value, bool acquire, bool release) {
  touch_atomic(p, true, true, order(acquire, release), HERE);
  uint32_t before = *p;
  *p = value;
  return before;
}
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t expected, uint32_t value, bool acquire, bool release) {
  touch_atomic(p, true, true, order(acquire, release), HERE);
  uint32_t before = *p;
  if (before == expected) *p = value;
  return before;
}
uint32_t atomic_load(const uint32_t* p, bool acquire) {
  idle();
  current->polls = p, current->polls_from = HERE;
  touch_atomic(p, true, false, order(acquire, false), HERE);
  return current->polled = *p;
}
void atomic_store(uint32_t* p, uint32_t value, bool release) {
  touch_atomic(p, false, true, order(false, release), HERE);
  *p = value;
}

// Both ways: relaxed atomics before it have collected, those after it publish.
void fence() {
  current->knows = joined(current->knows, current->unfenced);
  current->fenced = published(*current);
}

}  // namespace interflow::emulation
