// Runs a random program, one column of operations a thread, and logs who did what in which order: what the checker says of it is compared
// with plain vector clocks.
#include "program.h"

#include "common/cuda/device.cuh"
#include "common/cuda/launch.h"

namespace interflow {
namespace {

// Every value stays zero; only the order of accesses matters.
__global__ void __launch_bounds__(kProgramThreads) program_kernel(const __grid_constant__ ProgramParams P) {
  int64_t thread = int64_t(blockIdx.x) * kProgramThreads + threadIdx.x, threads = int64_t(gridDim.x) * kProgramThreads;
  for (int64_t step = 0; step < P.steps; ++step) {
    int64_t at = step * threads + thread;
    int64_t what = P.operations[at];
    uint32_t* word = P.words + what / 16;
    switch (Operation(what % 16)) {
      case Operation::None: break;
      case Operation::Read:
        log_operation(at);
        asm volatile("" ::"r"(*word));
        break;
      case Operation::Write:
        log_operation(at);
        *word = 0;
        break;
      case Operation::Barrier:
        log_operation(at);
        __syncthreads();
        break;
      case Operation::WarpBarrier:
        log_operation(at);
        __syncwarp();
        break;
      case Operation::Fence:
        log_operation(at);
        __threadfence();
        break;
      // An atomic may let others go first: logged when it has happened.
      case Operation::Release: atomic_add_release(word, 0), log_operation(at); break;
      case Operation::Acquire: load_acquire(word), log_operation(at); break;
      case Operation::AcqRel: atomic_add_acq_rel(word, 0), log_operation(at); break;
      case Operation::Relaxed: atomic_add_relaxed(word, 0), log_operation(at); break;
      case Operation::Store: store_relaxed(word, 0), log_operation(at); break;
    }
  }
}

}  // namespace

cudaError_t launch_program(const ProgramParams& P, int64_t blocks, cudaStream_t stream) {
  return launch(program_kernel, {blocks, kProgramThreads, 0, stream}, P);
}

}  // namespace interflow
