// stage_end on NHWC maps. kWide: 16-byte accesses everywhere; kResidual, there: whether there is one; the others ask.
#pragma once
#include "stage_end/cuda/chunk.cuh"

namespace interflow {

template <class T, bool kResidual, bool kWide>
__global__ void __launch_bounds__(kMapThreads, kWide ? 3 : 2) end_pixels(const __grid_constant__ EndParams P) {
  constexpr int V = kChunk<T>;
  const EndPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool has_residual = kWide ? kResidual : P.residual.map.data != nullptr;

  // This thread's place in a unit
  int columns = plan.slab / V, column = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;  // row: of the sums
  int slot = row / plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + column * V;
    float sums[V] = {};

    if (slot < plan.images && image < s.batch && channel < s.channels) {
      int count = int(min(int64_t(V), s.channels - channel));
      const StridedMap &u = P.u.map, &residual = P.residual.map;
      const T* from = static_cast<const T*>(u.data) + image * u.stride_b + channel * u.stride_c;
      const T* to_add = static_cast<const T*>(residual.data) + image * residual.stride_b + channel * residual.stride_c;
      T* v = static_cast<T*>(P.v) + image * plan.positions * s.channels + channel;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size), lane = row - slot * plan.lanes;
      Chunk shift;
      load_shift<T, V>(shift, P, channel, count);

      for (int i = first + lane; i < last; i += plan.lanes * kEndAtOnce) {
        // Load
        Chunk x[kEndAtOnce], added[kEndAtOnce];
#pragma unroll
        for (int j = 0; j < kEndAtOnce; ++j) {
          int pixel = i + j * plan.lanes;
          if constexpr (kWide) {
            int offset = pixel * int(s.channels);
            load_whole_if(x[j], pixel < last, from + offset, policy);
            if constexpr (kResidual) load_whole_if(added[j], pixel < last, to_add + offset, policy);
          } else if (pixel < last) {
            int h = int(divide(uint32_t(pixel), plan.row)), w = pixel - h * int(plan.row.divisor);
            load_few(x[j], from + h * u.stride_h + w * u.stride_w, count, P.u.access, u.stride_c);
            if (has_residual) load_few(added[j], to_add + h * residual.stride_h + w * residual.stride_w, count, P.residual.access, residual.stride_c);
          }
        }

        // Add, activate, store, sum
#pragma unroll
        for (int j = 0; j < kEndAtOnce; ++j) {
          int pixel = i + j * plan.lanes;
          if (j > 0 && pixel >= last) break;
          end_chunk<T>(x[j], shift, added[j], has_residual, P.relu);
          if constexpr (kWide)
            store_whole(v + pixel * int(s.channels), x[j]);
          else
            store_few(v + pixel * s.channels, x[j], count, P.v_access);
#pragma unroll
          for (int k = 0; k < V; ++k) sums[k] += Packed<T>::get(x[j][k / kPer<T>], k % kPer<T>);  // those behind `count` are nobody's
        }
      }
    }

    // Sum over the block, when nobody reads the last unit's sums any more
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows()[row * plan.slab + column * V + i] = sums[i];
    __syncthreads();
    finish_means<false>(P, at, shared, plan.lanes);
  }
}

}  // namespace interflow
