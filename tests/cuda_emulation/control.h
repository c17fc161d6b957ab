// What tests set from outside, and what kernels' twins call: everything that emulation.h needs of the runtime.
#pragma once
#include <cstddef>
#include <cstdint>

namespace interflow::emulation {

struct Settings {
  int64_t blocks = 7;  // that "fit the device" at once
  uint64_t seed = 0;
  uint64_t order = 0;  // a hash of who ran after whom in the last launch
  int64_t copies = 0;  // asynchronous ones of the last launch
};
extern Settings settings;

// --- indices
uint32_t thread_index() __attribute__((pure));
uint32_t block_index() __attribute__((pure));
uint32_t threads() __attribute__((pure));
uint32_t blocks() __attribute__((pure));
unsigned char* shared_memory() __attribute__((pure));

// --- memory: each checks the access, then makes it
enum class Cached : uint8_t { Coherent, Stream };
void load(void* value, const void* p, int bytes, Cached cached);
void store(void* p, const void* value, int bytes);
// The copy is made where it is waited for; until then nobody has written what it goes to.
void copy_async(void* to, const void* from, int bytes);
void wait_for_copies();
uint32_t atomic_add(uint32_t* p, uint32_t add, bool acquire, bool release);
uint32_t atomic_exchange(uint32_t* p, uint32_t value, bool acquire, bool release);
uint32_t atomic_compare_exchange(uint32_t* p, uint32_t expected, uint32_t value, bool acquire, bool release);
uint32_t atomic_load(const uint32_t* p, bool acquire);
void atomic_store(uint32_t* p, uint32_t value, bool release);
void fence();

// --- meetings
int barrier(int vote, const char* file, int line);
void sync_warp(uint32_t mask);
void shuffle(uint32_t mask, void* value, int bytes, int from_lane);  // replaced by that lane's, if there is such a lane
uint32_t vote(uint32_t mask, bool yes);
// d [M, N] = c + a [M, K] b [K, N] over the warp; every lane gives and gets fragments in PTX's layout.
void mma_16x8x8_tf32(float* c, const uint32_t* a, const uint32_t* b);
void wait_a_little();
uint64_t nanoseconds();  // which pass only where threads wait for a word, a fifth of a millisecond each time
[[noreturn]] void give_up(const char* who, uint32_t number, const char* what, const char* expected);
[[noreturn]] void finish_thread();

// --- launching
struct Launch {
  void (*invoke)(const void* call);  // what every thread runs
  const void* call;
  const void* params;
  int64_t params_bytes;
  int64_t blocks;
  int threads;
  int shared_bytes;
};
bool launch_kernel(const Launch& launch);

}  // namespace interflow::emulation
