// Sums of rows, their sum by the last block to arrive, the same by tickets, and a product by a matrix instruction.
#include "sample.h"

#include "common/cuda/device.cuh"
#include "common/cuda/launch.h"
#include "sample_host.h"

namespace interflow {
namespace {

constexpr int kThreads = 64;

__device__ float row_sum(const SampleParams& P, int64_t row) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  int thread = int(threadIdx.x);
  float sum = 0;
  for (int64_t i = thread; i < P.width; i += kThreads) sum += load_stream<float>(P.x + row * P.width + i, cache_policy(true));
  for (int by = 16; by > 0; by /= 2) sum += __shfl_xor_sync(~0u, sum, by);
  if (thread % kWarp == 0) shared[thread / kWarp] = sum;
  __syncthreads();  // partial sums are there
  float total = shared[0] + shared[1];
  __syncthreads();  // and read by everybody
  return total;
}

// y [rows]; one block a row.
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ SampleParams P) {
  float sum = row_sum(P, blockIdx.x);
  if (threadIdx.x == 0) P.y[blockIdx.x] = sum;
}

// y [1]; rows are dealt to the blocks, the last one to arrive adds up in order.
__global__ void __launch_bounds__(kThreads) last_kernel(const __grid_constant__ SampleParams P) {
  uint32_t* last = reinterpret_cast<uint32_t*>(shared_memory()) + 2;
  for (int64_t row = blockIdx.x; row < P.rows; row += gridDim.x) {
    float sum = row_sum(P, row);
    if (threadIdx.x == 5) P.partial[row] = sum;
  }
  __syncthreads();  // rows are written
  if (threadIdx.x == 0) *last = atomic_add_acq_rel(P.counters, 1) == gridDim.x - 1;
  __syncthreads();  // the verdict is there
  if (*last == 0) return;
  if (threadIdx.x == 1) {
    float total = 0;
    for (int64_t row = 0; row < P.rows; ++row) total += load_shared_result(P.partial + row);
    *P.y = total;
    store_relaxed(P.counters, 0);
  }
}

// y [1]; tickets 0 ... rows - 1 are sums, the next one waits for them, whoever draws one beyond leaves.
__global__ void __launch_bounds__(kThreads) tickets_kernel(const __grid_constant__ SampleParams P) {
  uint32_t* drawn = reinterpret_cast<uint32_t*>(shared_memory()) + 2;
  uint32_t tickets = uint32_t(P.rows) + 1;
  for (;;) {
    if (threadIdx.x == 0) *drawn = atomic_add_relaxed(P.counters, 1);
    __syncthreads();  // the ticket is there
    uint32_t ticket = *drawn;
    __syncthreads();  // and read
    if (ticket >= tickets) {
      // The last of all to leave resets both counters.
      if (threadIdx.x == 0 && ticket == tickets + gridDim.x - 1) store_relaxed(P.counters, 0), store_relaxed(P.counters + 1, 0);
      return;
    }
    bool waits = ticket == tickets - 1;
    if (waits) {
      if (threadIdx.x == 0)
        while (load_acquire(P.counters + 1) < uint32_t(P.rows)) wait_a_little();
      __syncthreads();  // everybody knows what thread 0 has seen
      if (threadIdx.x == 3) {
        float total = 0;
        for (int64_t row = 0; row < P.rows; ++row) total += P.partial[row];
        *P.y = total;
      }
    } else {
      float sum = row_sum(P, ticket);
      if (threadIdx.x == 0) {
        P.partial[ticket] = sum;
        atomic_add_release(P.counters + 1, 1);
      }
    }
  }
}

// y [16, 8] = x [16, 8] times rows 16 ... 23 of x, in TF32, by way of shared memory that the warp alone orders.
__global__ void __launch_bounds__(kWarp) product_kernel(const __grid_constant__ SampleParams P) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  int lane = int(threadIdx.x), g = lane / 4, j = lane % 4;
  for (int i = lane; i < 48; i += kWarp) reinterpret_cast<float4*>(shared)[i] = load_stream<float4>(P.x + i * 4, cache_policy(false));
  __syncwarp();
  auto x = [&](int row, int column) { return to_tf32(shared[row * 8 + column]); };
  uint32_t a[4] = {x(g, j), x(g + 8, j), x(g, j + 4), x(g + 8, j + 4)}, b[2] = {x(16 + j, g), x(20 + j, g)};
  float c[4] = {};
  mma_16x8x8_tf32(c, a, b);
  for (int i = 0; i < 4; ++i) P.y[(g + i / 2 * 8) * 8 + 2 * j + i % 2] = c[i];
}

// y [rows], rows of 4 numbers: brought into shared memory by one thread of each, row after row of a block into the same place, added up by another.
__global__ void __launch_bounds__(kThreads) copies_kernel(const __grid_constant__ SampleParams P) {
  float4* shared = reinterpret_cast<float4*>(shared_memory());
  auto start = [&](int64_t first) {
    int64_t row = first + int(threadIdx.x);
    if (row < P.rows) copy_async<16>(shared + threadIdx.x, P.x + row * 4);
  };
  start(blockIdx.x * kThreads);
  for (int64_t first = blockIdx.x * kThreads; first < P.rows; first += gridDim.x * kThreads) {
    wait_for_copies();
    __syncthreads();  // copies are there
    int mine = kThreads - 1 - int(threadIdx.x);
    bool there = first + mine < P.rows;
    float4 x = there ? shared[mine] : float4{};
    __syncthreads();  // copies are read
    start(first + gridDim.x * kThreads);
    if (there) P.y[first + mine] = x.x + x.y + x.z + x.w;
  }
}

// y [6, 32]: what lanes get from each other.
__global__ void __launch_bounds__(kWarp) lanes_kernel(const __grid_constant__ SampleParams P) {
  int lane = int(threadIdx.x);
  float x = load_stream<float>(P.x + lane, cache_policy(true)), y[6];
  y[0] = __shfl_down_sync(~0u, x, 3);
  y[1] = __shfl_sync(~0u, x, 31 - lane);
  y[2] = __shfl_xor_sync(~0u, x, 5);
  y[3] = float(__popc(__ballot_sync(~0u, x > 0)));
  y[4] = float(__syncthreads_count(x < 0));
  y[5] = __uint_as_float(to_tf32(x));
  for (int i = 0; i < 6; ++i) P.y[i * kWarp + lane] = y[i];
}

}  // namespace

cudaError_t launch_sample(const std::string& kernel, const SampleParams& P, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (kernel == "sums") return launch(sums_kernel, {P.rows, kThreads, 8, stream}, P);
  if (kernel == "copies") return launch(copies_kernel, {resident_blocks(copies_kernel, kThreads, kThreads * 16, &error), kThreads, kThreads * 16, stream}, P);
  if (kernel == "lanes") return launch(lanes_kernel, {1, kWarp, 0, stream}, P);
  if (kernel == "product") return launch(product_kernel, {1, kWarp, 24 * 8 * 4, stream}, P);
  if (kernel == "last") return launch(last_kernel, {resident_blocks(last_kernel, kThreads, 16, &error), kThreads, 16, stream}, P);
  return launch(tickets_kernel, {resident_blocks(tickets_kernel, kThreads, 16, &error), kThreads, 16, stream}, P);
}

}  // namespace interflow
