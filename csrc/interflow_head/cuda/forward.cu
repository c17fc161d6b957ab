// interflow_head, forward: pool, multiply and aggregate in one launch.
//
//   p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw))),  z_i = p_i W_i^T + b_i,  y = attention(stack(z_i))
//
// Blocks draw tickets in order (see schedule.h): pooling is bound by memory, and while some blocks wait for a group's last unit
// the others pool the next group. The next ticket is drawn while a block still works on the last, but not before its loads are on their way: drawn at once, the
// blocks that start first would take two of a small batch's few tickets. What it is needs to be known only at the unit's end.
#include "interflow_head/cuda/pool.cuh"
#include "interflow_head/cuda/tail.cuh"
#include "common/cuda/launch.h"

namespace interflow {
namespace {

constexpr int kHeaderFloats = 4;  // flag, ticket
static_assert(4 * (kHeaderFloats + TailShared<kNarrowClasses / 8>::floats(kMaxStages, true)) <= 99 << 10, "what a block may have on sm_86, 89 and 120");

// Waits until all pooled values of a group are there, for the tile that is this ticket's.
constexpr uint64_t kPatience = 2'000'000'000;  // nanoseconds
__device__ __forceinline__ void wait_for_group(const HeadForward& P, uint32_t group, uint32_t ticket) {
  if (threadIdx.x == 0) {
    uint32_t* done = P.counters + P.schedule.done_counter(group);
    uint32_t events = P.schedule.events(group);
    uint64_t began = 0;
    while (load_relaxed(done) != events) {  // an acquire in every round would empty the cache of the block beside it
      wait_a_little();
      if (!P.watchdog) continue;
      uint64_t now = nanoseconds();
      if (began == 0) began = now;
      if (now - began > kPatience) give_up("interflow_head_forward_kernel, ticket", ticket, "counter of its group's events", "all units of the group were done within two seconds");
    }
    load_acquire(done);
  }
  __syncthreads();
}

// Behind the wait: the last tile to have waited leaves the group's counters zero. before: what the counter of waits was when this tile added its own.
__device__ __forceinline__ void note_waited(const HeadForward& P, uint32_t group, uint32_t before) {
  if (before + 1 != P.schedule.tile_count(group)) return;
  store_relaxed(P.counters + P.schedule.done_counter(group), 0);
  store_relaxed(P.counters + P.schedule.waited_counter(group), 0);
}

// y and branches of a tile from the warps' shares.
template <int NT, bool Branches>
__device__ __forceinline__ void aggregate(const HeadForward& P, const Tile& tile, const TailShared<NT>& shared, bool linear) {
  const HeadTail& T = P.tail;
  for (int o = threadIdx.x; o < TailShared<NT>::kOutputs; o += kHeadThreads) {
    int row = o / (NT * 8), column = o - row * NT * 8;
    if (row >= tile.images || column >= tile.classes) continue;
    int64_t image = tile.image + row, klass = tile.klass + column;
    if constexpr (Branches) {
      finish_scores(T, shared, o, klass);
      if (P.branches)
#pragma unroll 1
        for (int i = 0; i < T.count; ++i)
          store_float(P.branches, P.out, (image * T.count + i) * T.classes + klass, shared.z[i * kWarps * TailShared<NT>::kOutputs + o]);
    }
    float y = linear ? add_warps<NT>(shared.y, o) + shared.offset[column] : finish_gates(T, shared, o);
    store_float(P.y, P.out, image * T.classes + klass, y);
  }
}

// A tile of classes for all images of a group. The next ticket goes to *slot.
template <class W, int NT, bool Branches>
__device__ __forceinline__ void tail_tile(const HeadForward& P, uint32_t number, const Ticket& ticket, float* scratch, uint32_t* slot) {
  const HeadTail& T = P.tail;
  uint32_t group = ticket.group;
  TailShared<NT> shared(scratch, from_here(T.count), Branches);
  int64_t klass = int64_t(ticket.index) * NT * 8, first = int64_t(group) * P.schedule.group_images;
  int images = P.schedule.images(group), classes = int(min(int64_t(NT * 8), T.classes - klass));
  bool linear = !Branches || T.mode != Attention::Gated;

  // What needs no pooled values
  const char* weights = static_cast<const char*>(T.weight) + klass * T.width * int(sizeof(W));
  for (int64_t at = int64_t(threadIdx.x) * 128; at < classes * T.width * int(sizeof(W)); at += kHeadThreads * 128) prefetch_l2(weights + at);
  if (linear) prepare(T, {first, klass, images, classes}, shared);

  // 16 images at a time
  wait_for_group(P, group, number);
  uint32_t next = 0, waited = 0;  // asked for here, awaited behind the first product
  if (threadIdx.x == 0) {
    next = draw_ticket(P.counters + HeadSchedule::kNext);
    waited = atomic_add_relaxed(P.counters + P.schedule.waited_counter(group), 1);
  }
  for (int done = 0; done < images; done += kTileImages) {
    Tile tile{first + done, klass, min(kTileImages, images - done), classes};
    multiply<W, NT, Branches>(T, tile, shared, linear);
    __syncthreads();
    if (done == 0 && threadIdx.x == 0) {
      note_waited(P, group, waited);
      *slot = next;
    }
    aggregate<NT, Branches>(P, tile, shared, linear);
    __syncthreads();
  }
}

template <class W>
__device__ __forceinline__ void tail(const HeadForward& P, uint32_t number, const Ticket& ticket, float* scratch, uint32_t* slot) {
  if (P.by_branch())
    tail_tile<W, kNarrowClasses / 8, true>(P, number, ticket, scratch, slot);
  else if (P.schedule.tile_classes(ticket.group) == kNarrowClasses)
    tail_tile<W, kNarrowClasses / 8, false>(P, number, ticket, scratch, slot);
  else
    tail_tile<W, kWideClasses / 8, false>(P, number, ticket, scratch, slot);
}

template <class W>
__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_forward_kernel(const __grid_constant__ HeadForward P) {
  uint32_t *flag = reinterpret_cast<uint32_t*>(shared_memory()), *slot = flag + 1;  // slot: the ticket; the next one, once all threads have read it
  float* scratch = reinterpret_cast<float*>(shared_memory()) + kHeaderFloats;
  Pending before{0, 0, nullptr};
  if (threadIdx.x == 0) *slot = draw_ticket(P.counters + HeadSchedule::kNext);
  for (;;) {
    __syncthreads();
    uint32_t drawn = *slot;
    bool more = drawn < P.schedule.tickets;
    Ticket ticket = P.schedule.ticket(drawn);
    if (more && ticket.pool) {
      pool(P, drawn, ticket.group, P.schedule.unit(ticket.group, ticket.index), before, scratch, flag, slot);
      continue;
    }
    settle(P, before, scratch, flag);  // before this block waits itself: others may wait for it
    if (!more) break;
    tail<W>(P, drawn, ticket, scratch, slot);
  }

  // The last block to leave makes the counters zero again
  if (threadIdx.x == 0 && atomic_add_relaxed(P.counters + HeadSchedule::kGone, 1) + 1 == gridDim.x) {
    store_relaxed(P.counters + HeadSchedule::kNext, 0);
    store_relaxed(P.counters + HeadSchedule::kGone, 0);
  }
}

template <class W>
cudaError_t launch_for(const HeadForward& P, cudaStream_t stream) {
  bool branches = P.by_branch();
  int n = P.tail.count, narrow = TailShared<kNarrowClasses / 8>::floats(n, branches), wide = 0;
  if (!branches) wide = TailShared<kWideClasses / 8>::floats(n, false);
  int floats = kHeaderFloats + (narrow > wide ? narrow : wide);
  if (floats < kHeaderFloats + kPoolSharedFloats) floats = kHeaderFloats + kPoolSharedFloats;
  cudaError_t error;
  int64_t blocks = resident_blocks(interflow_head_forward_kernel<W>, kHeadThreads, floats * 4, &error);
  if (error != cudaSuccess) return error;
  if (blocks > P.schedule.tickets) blocks = P.schedule.tickets;
  return launch(interflow_head_forward_kernel<W>, {blocks, kHeadThreads, floats * 4, stream}, P);
}

}  // namespace

// One kernel for each dtype of weight: in one together they keep more registers alive than there are.
cudaError_t launch_head_forward(const HeadForward& P, cudaStream_t stream) {
  switch (P.tail.weight_dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
