// stage_end on NCHW maps, and on whatever has no stride 1. kWide: 16-byte accesses everywhere; kResidual, there: whether there is one; the others ask.
#pragma once
#include "stage_end/cuda/run.cuh"

namespace interflow {

// Whether three blocks a multiprocessor leave the registers that a residual takes: on an H200 they took 0.83 times the time of two.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kSpareRegisters = false;  // ptxas spills
#else
constexpr bool kSpareRegisters = true;
#endif

// With a residual eight loads are on their way: 80 registers do not hold them and their planes on sm_100.
template <class T, bool kResidual, bool kWide>
__global__ void __launch_bounds__(kMapThreads, kWide && (!kResidual || kSpareRegisters) ? 3 : 2) end_planes(const __grid_constant__ EndParams P) {
  constexpr int V = kChunk<T>;
  const EndPlan& plan = P.plan;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool has_residual = kWide ? kResidual : P.residual.map.data != nullptr;
  auto shift_of = [&](const EndRun& run, int plane) {
    return P.shift && plane < run.planes ? load_as_float(P.shift, P.shift_dtype, (run.channel + plane) * P.shift_stride) : -0.0f;
  };

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    EndRun run(at, plan);
    int64_t image = at.group, begin = run.begin(plan);
    const T* u = static_cast<const T*>(P.u.map.data) + image * P.u.map.stride_b + begin;
    const T* residual = static_cast<const T*>(P.residual.map.data) + image * P.residual.map.stride_b + begin;
    T* v = static_cast<T*>(P.v) + image * plan.shape.channels * plan.positions + begin;
    int chunks = (run.count + V - 1) / V;
    float alone = 0;

    for (int first = 0; first < chunks; first += kMapThreads * kEndAtOnce) {
      // Load
      Chunk x[kEndAtOnce], added[kEndAtOnce];
      EndSplit split[kEndAtOnce];
      float shift[kEndAtOnce];
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        int chunk = first + j * kMapThreads + int(threadIdx.x);
        bool inside = chunk < chunks;
        if constexpr (kWide) {
          load_whole_if(x[j], inside, u + chunk * V, policy);
          if constexpr (kResidual) load_whole_if(added[j], inside, residual + chunk * V, policy);
        } else if (inside) {
          int count = min(V, run.count - chunk * V);
          load_chunk<T>(x[j], P.u, image, run, plan, chunk, count);
          if (has_residual) load_chunk<T>(added[j], P.residual, image, run, plan, chunk, count);
        }
      }
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        split[j] = EndSplit::of<V>(min(first + j * kMapThreads + int(threadIdx.x), chunks - 1), plan);
        shift[j] = shift_of(run, split[j].plane);
      }
      if (first == 0) __syncthreads();  // nobody reads the last unit's sums any more

      // Add, activate, store, sum
#pragma unroll
      for (int j = 0; j < kEndAtOnce; ++j) {
        int chunk = first + j * kMapThreads + int(threadIdx.x);
        if (chunk >= chunks) break;
        int count = kWide ? V : min(V, run.count - chunk * V);
        Chunk shifts;
        uint32_t left = spread<T>(shift[j]);
#pragma unroll
        for (int q = 0; q < kChunkWords; ++q) shifts[q] = left;
        if (!kWide && plan.slots > 2) {  // each element may be of another plane
#pragma unroll
          for (int q = 0; q < kChunkWords; ++q) {
            float of_word[kPer<T>];
#pragma unroll
            for (int k = 0; k < kPer<T>; ++k) of_word[k] = shift_of(run, int(divide(uint32_t(chunk * V + q * kPer<T> + k), plan.plane)));
            shifts[q] = Packed<T>::pack(of_word);
          }
        } else if (split[j].left < V) {
          uint32_t right = spread<T>(shift_of(run, split[j].plane + 1));
#pragma unroll
          for (int q = 0; q < kChunkWords; ++q) {
            uint32_t mine = below<T>(q, split[j].left);
            shifts[q] = (left & mine) | (right & ~mine);
          }
        }
        end_chunk<T>(x[j], shifts, added[j], has_residual, P.relu);
        if constexpr (kWide) {
          store_whole(v + chunk * V, x[j]);
        } else {
          store_few(v + chunk * V, x[j], count, P.v_access);
#pragma unroll
          for (int q = 0; q < kChunkWords; ++q) x[j][q] &= below<T>(q, count);
        }
        leave_sums<T>(shared.rows(), alone, plan, chunk, split[j], [&](int i) { return Packed<T>::get(x[j][i / kPer<T>], i % kPer<T>); });
      }
    }

    if (plan.slots == 1) shared.rows()[threadIdx.x] = alone;
    __syncthreads();
    finish_means_of<true>(P, at, shared, [&](auto result) { sum_planes<V>(shared, plan, run, [&](int plane, float sum) { result(0, plane, sum); }); });
  }
}

}  // namespace interflow
