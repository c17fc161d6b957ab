// interflow_head, forward: pool, multiply and aggregate in one launch.
//
//   p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw))),  z_i = p_i W_i^T + b_i,  y = attention(stack(z_i))
//
// Blocks draw tickets in order (see interflow_head_schedule.h): pooling is bound by memory, and while some blocks wait for a group's last unit
// the others pool the next group. The next ticket is drawn while a block still works on the last, but not before it has loaded: drawn at once, the
// blocks that start first would take two of a small batch's few tickets.
#include "interflow_head_pool.cuh"
#include "interflow_head_tail.cuh"
#include "launch.h"

namespace interflow {
namespace {

constexpr int kHeaderFloats = 4;  // ticket, flag

// Asks for the weights of a tile, contiguous in memory, while its pooled values are still awaited: a first launch finds them in DRAM.
__device__ __forceinline__ void prefetch_weights(const HeadTail& T, int64_t klass, int classes) {
  int64_t row = T.width * (T.weight_dtype == DType::F32 ? 4 : 2), bytes = min(int64_t(classes), T.classes - klass) * row;
  const char* first = static_cast<const char*>(T.weight) + klass * row;
  for (int64_t at = int64_t(threadIdx.x) * 128; at < bytes; at += kHeadThreads * 128) prefetch_l2(first + at);
}

// Waits until all pooled values of a group are there; the last tile to have waited leaves the group's counters zero.
__device__ __forceinline__ void wait_for_group(const HeadForward& P, uint32_t group) {
  if (threadIdx.x == 0) {
    uint32_t* done = P.counters + P.schedule.done_counter(group);
    uint32_t* waited = P.counters + P.schedule.waited_counter(group);
    uint32_t events = P.schedule.events(group);
    while (load_acquire(done) != events) wait_a_little();
    if (atomic_add_relaxed(waited, 1) + 1 == P.schedule.tile_count(group)) {
      store_relaxed(done, 0);
      store_relaxed(waited, 0);
    }
  }
  __syncthreads();
}

// y and branches of a tile from the warps' shares.
template <int NT>
__device__ __forceinline__ void aggregate(const HeadForward& P, const Tile& tile, const TailShared<NT>& shared, bool branches) {
  const HeadTail& T = P.tail;
  __syncthreads();
  for (int o = threadIdx.x; o < TailShared<NT>::kOutputs; o += kHeadThreads) {
    int row = o / (NT * 8), column = o - row * NT * 8;
    if (row >= tile.images || column >= tile.classes) continue;
    int64_t image = tile.image + row, klass = tile.klass + column;
    if (branches) {
      finish_scores(T, shared, o, klass);
      if (P.branches)
#pragma unroll 1
        for (int i = 0; i < T.count; ++i)
          store_float(P.branches, P.out, (image * T.count + i) * T.classes + klass, shared.z[i * kWarps * TailShared<NT>::kOutputs + o]);
    }
    float y;
    if (T.mode == Attention::Gated) {
      y = finish_gates(T, shared, o);
    } else {
      y = add_warps<NT>(shared.y, o);
      if (T.bias.data)
#pragma unroll 1
        for (int i = 0; i < T.count; ++i) y = fmaf(shared.a[i * NT * 8 + column], parameter(T.bias, i * T.classes + klass), y);
      y += aggregation_offset(T, klass);
    }
    store_float(P.y, P.out, image * T.classes + klass, y);
  }
}

template <class W, int NT>
__device__ __forceinline__ void tail_tile(const HeadForward& P, uint32_t group, uint32_t index, float* scratch, bool branches) {
  TailShared<NT> shared(scratch, P.tail.count);
  int64_t klass = int64_t(index) * NT * 8, first = int64_t(group) * P.schedule.group_images;
  int classes = int(min(int64_t(NT * 8), P.tail.classes - klass));
  for (int done = 0; done < P.schedule.images(group); done += kTileImages) {
    Tile tile{first + done, klass, min(kTileImages, P.schedule.images(group) - done), classes};
    multiply<W>(P.tail, tile, shared, branches);
    aggregate(P, tile, shared, branches);
    __syncthreads();
  }
}

template <class W>
__device__ __forceinline__ void tail(const HeadForward& P, uint32_t group, uint32_t index, float* scratch) {
  if (P.branches || P.tail.mode == Attention::Gated)
    tail_tile<W, kNarrowClasses / 8>(P, group, index, scratch, true);
  else if (P.schedule.tile_classes(group) == kNarrowClasses)
    tail_tile<W, kNarrowClasses / 8>(P, group, index, scratch, false);
  else
    tail_tile<W, wide_classes(sizeof(W) == 4, false) / 8>(P, group, index, scratch, false);
}

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_forward_kernel(const __grid_constant__ HeadForward P) {
  uint32_t* header = reinterpret_cast<uint32_t*>(shared_memory());
  float* scratch = reinterpret_cast<float*>(shared_memory()) + kHeaderFloats;
  uint32_t next = 0;
  if (threadIdx.x == 0) next = atomic_add_relaxed(P.counters + HeadSchedule::kNext, 1);
  for (;;) {
    // Draw
    if (threadIdx.x == 0) header[0] = next;
    __syncthreads();
    uint32_t drawn = header[0];
    if (drawn >= P.schedule.tickets) break;
    Ticket ticket = P.schedule.ticket(drawn);

    // Work
    if (ticket.pool) {
      pool(P, ticket.group, P.schedule.unit(ticket.group, ticket.index), scratch, header + 1);
      if (threadIdx.x == 0) next = atomic_add_relaxed(P.counters + HeadSchedule::kNext, 1);
    } else {
      int classes = P.schedule.tile_classes(ticket.group);
      prefetch_weights(P.tail, int64_t(ticket.index) * classes, classes);
      wait_for_group(P, ticket.group);
      if (threadIdx.x == 0) next = atomic_add_relaxed(P.counters + HeadSchedule::kNext, 1);
      switch (P.tail.weight_dtype) {
        case DType::BF16: tail<__nv_bfloat16>(P, ticket.group, ticket.index, scratch); break;
        case DType::F16: tail<__half>(P, ticket.group, ticket.index, scratch); break;
        default: tail<float>(P, ticket.group, ticket.index, scratch); break;
      }
    }
    __syncthreads();
  }

  // The last block to leave makes the counters zero again
  if (threadIdx.x == 0 && atomic_add_relaxed(P.counters + HeadSchedule::kGone, 1) + 1 == gridDim.x) {
    store_relaxed(P.counters + HeadSchedule::kNext, 0);
    store_relaxed(P.counters + HeadSchedule::kGone, 0);
  }
}

}  // namespace

cudaError_t launch_head_forward(const HeadForward& P, cudaStream_t stream) {
  bool branches = P.branches || P.tail.mode == Attention::Gated;
  int n = P.tail.count, narrow = TailShared<kNarrowClasses / 8>::floats(n, branches), wide = branches ? 0 : TailShared<kWideClasses / 8>::floats(n, false);
  int floats = kHeaderFloats + (narrow > wide ? narrow : wide);
  if (floats < kHeaderFloats + kPoolSharedFloats) floats = kHeaderFloats + kPoolSharedFloats;
  cudaError_t error;
  int64_t blocks = resident_blocks(interflow_head_forward_kernel, kHeadThreads, floats * 4, &error);
  if (error != cudaSuccess) return error;
  if (blocks > P.schedule.tickets) blocks = P.schedule.tickets;
  return launch(interflow_head_forward_kernel, {blocks, kHeadThreads, floats * 4, stream}, P);
}

}  // namespace interflow
