// The operations of random programs and their launch.
#pragma once
#include <driver_types.h>

#include <cstdint>

namespace interflow {

constexpr int kProgramThreads = 64;

enum class Operation { None, Read, Write, Barrier, WarpBarrier, Fence, Release, Acquire, AcqRel, Relaxed, Store };

struct ProgramParams {
  const int64_t* operations;  // [steps, threads of all blocks]: Operation + 16 * word
  uint32_t* words;
  int64_t steps;
};

cudaError_t launch_program(const ProgramParams& P, int64_t blocks, cudaStream_t stream);
void log_operation(int64_t at);

}  // namespace interflow
