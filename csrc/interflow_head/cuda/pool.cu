// interflow_pool: the first half of interflow_head's forward kernel alone, in one launch, with the bits of its pooled values.
//
//   p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw)))
//
// Nobody waits here: blocks draw units in order until there are none. A unit's parts meet as they do there (pool.cuh).
#include "interflow_head/cuda/pool.cuh"
#include "common/cuda/launch.h"

namespace interflow {
namespace {

constexpr int kHeaderFloats = 4;  // flag, ticket

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_pool_kernel(const __grid_constant__ HeadForward P) {
  uint32_t *flag = reinterpret_cast<uint32_t*>(shared_memory()), *slot = flag + 1;  // slot: the ticket; the next one, once all threads have read it
  float* scratch = reinterpret_cast<float*>(shared_memory()) + kHeaderFloats;
  Pending before{0, 0, nullptr};
  if (threadIdx.x == 0) *slot = draw_ticket(P.counters + HeadSchedule::kNext);
  for (;;) {
    __syncthreads();
    uint32_t drawn = *slot;
    if (drawn >= P.schedule.tickets) break;
    Ticket ticket = P.schedule.ticket(drawn);
    pool(P, drawn, ticket.group, P.schedule.unit(ticket.group, ticket.index), before, scratch, flag, slot);
  }
  settle(P, before, scratch, flag);

  // The last block to leave makes the counters zero again; behind an acquire, so that no block's last addition comes after it
  if (threadIdx.x == 0 && atomic_add_acq_rel(P.counters + HeadSchedule::kGone, 1) + 1 == gridDim.x) {
    for (uint32_t group = 0; group < P.schedule.groups; ++group) store_relaxed(P.counters + P.schedule.done_counter(group), 0);
    store_relaxed(P.counters + HeadSchedule::kNext, 0);
    store_relaxed(P.counters + HeadSchedule::kGone, 0);
  }
}

}  // namespace

cudaError_t launch_head_pool(const HeadForward& P, cudaStream_t stream) {
  int bytes = 4 * (kHeaderFloats + kPoolSharedFloats);
  cudaError_t error;
  int64_t blocks = resident_blocks(interflow_pool_kernel, kHeadThreads, bytes, &error);
  if (error != cudaSuccess) return error;
  if (blocks > P.schedule.tickets) blocks = P.schedule.tickets;
  return launch(interflow_pool_kernel, {blocks, kHeadThreads, bytes, stream}, P);
}

}  // namespace interflow
