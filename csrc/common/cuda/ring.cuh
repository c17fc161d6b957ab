// A thread's own ring of copies: pieces of global memory on their way into shared memory while the thread works on those before.
#pragma once
#include "common/cuda/block_sums.cuh"

namespace interflow {

constexpr int kRingSlots = 3;  // one that the thread reads, two on their way

// kPieces of kBytes of each thread in each slot; neighbours lie beside each other.
template <int kPieces, int kBytes>
class CopyRing {
 public:
  static constexpr int kSlotBytes = kPieces * kBytes * kMapThreads, kRingBytes = kRingSlots * kSlotBytes;

  __device__ __forceinline__ explicit CopyRing(void* shared) : mine_(static_cast<unsigned char*>(shared) + threadIdx.x * kBytes) {}
  // Piece i of a slot.
  __device__ __forceinline__ void* at(int slot, int i) const { return mine_ + slot * kSlotBytes + i * (kBytes * kMapThreads); }
  __device__ __forceinline__ void begin(int slot, int i, const void* from) const { copy_async<kBytes>(at(slot, i), from); }
  // Of it, from a word on.
  template <class Part>
  __device__ __forceinline__ Part read(int slot, int i, int word = 0) const {
    return *reinterpret_cast<const Part*>(static_cast<const unsigned char*>(at(slot, i)) + 4 * word);
  }

 private:
  unsigned char* mine_;
};

// Which slot is next to fill and which next to read. fill(slot) begins the copies of the next piece of work, or none where there is no more.
class RingOrder {
 public:
  template <class Fill>
  __device__ __forceinline__ void begin(Fill fill) {
#pragma unroll
    for (int slot = 0; slot < kRingSlots - 1; ++slot) fill(slot), end_group_of_copies();
  }
  // Waits for the oldest piece, begins another behind the newest -> the slot of the oldest, to be read before the next call.
  template <class Fill>
  __device__ __forceinline__ int next(Fill fill) {
    wait_for_groups_but<kRingSlots - 2>();
    int slot = slot_, free = slot == 0 ? kRingSlots - 1 : slot - 1;
    fill(free), end_group_of_copies();
    slot_ = slot == kRingSlots - 1 ? 0 : slot + 1;
    return slot;
  }

 private:
  int slot_ = 0;
};

}  // namespace interflow
