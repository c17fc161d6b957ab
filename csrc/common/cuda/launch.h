// Launching a kernel and asking how many of its blocks a device runs at once. In .cu files only; the emulation has a twin.
#pragma once

#if INTERFLOW_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <tuple>

#include "common/cuda/capture.h"

namespace interflow {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int shared_bytes;
  cudaStream_t stream;
};

// Launches on the current device; the error is of this launch alone.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const LaunchShape& shape, const Params& params) {
  void* arguments[] = {const_cast<Params*>(&params)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(shape.blocks)), dim3(unsigned(shape.threads)), arguments, size_t(shape.shared_bytes), shape.stream);
}

// At most INTERFLOW_MAX_BLOCKS, where a test sets it: no result may depend on how many blocks a GPU runs at once. 0: as many as there is work for, which
// the hardware then hands out as others end.
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;
inline int64_t limited(int64_t blocks) {
  const char* text = std::getenv("INTERFLOW_MAX_BLOCKS");
  if (text && text[0] == '0' && !text[1]) return kMostBlocks;
  int64_t most = text ? std::atoll(text) : 0;
  return most > 0 && most < blocks ? most : blocks;
}

// How many blocks the current device runs at once; asked once for each kernel, device and size, since it costs microseconds.
// Asking also loads the kernel, which CUDA otherwise does at its first launch and refuses during a global capture: to be called before every launch.
// Raises the kernel's limit of dynamic shared memory where it takes more than 48 KB. 0 and an error where it cannot run there.
template <class Params>
int64_t resident_blocks(void (*kernel)(Params), int threads, int shared_bytes, cudaError_t* error) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, int>, int64_t> known;
  static std::map<std::pair<const void*, int>, int> limits;  // of dynamic shared memory; only ever raised, since a later launch may need the larger one
  const void* function = reinterpret_cast<const void*>(kernel);
  int device = 0, processors = 0, per_processor = 0;
  if ((*error = cudaGetDevice(&device)) != cudaSuccess) return 0;
  std::lock_guard<std::mutex> lock(mutex);
  int64_t& blocks = known[{function, device, threads, shared_bytes}];
  if (blocks) return limited(blocks);
  RelaxedCapture relaxed;
  if ((*error = relaxed.error()) != cudaSuccess) return 0;
  int& limit = limits[{function, device}];
  if (shared_bytes > (48 << 10) && shared_bytes > limit) {
    if ((*error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) != cudaSuccess) return 0;
    limit = shared_bytes;
  }
  if ((*error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device)) != cudaSuccess) return 0;
  if ((*error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, function, threads, size_t(shared_bytes))) != cudaSuccess) return 0;
  if (per_processor == 0) *error = cudaErrorLaunchOutOfResources;
  return limited(blocks = int64_t(processors) * per_processor);
}

}  // namespace interflow
#endif
