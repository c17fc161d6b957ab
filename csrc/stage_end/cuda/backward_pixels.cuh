// stage_end_backward on NHWC maps. kWide: 16-byte accesses everywhere; kRelu, there: whether v masks; the others ask.
#pragma once
#include "stage_end/cuda/chunk.cuh"

namespace interflow {

template <class T, bool kRelu, bool kWide>
__global__ void __launch_bounds__(kMapThreads, 2) end_pixels_backward(const __grid_constant__ EndBackwardParams P) {
  constexpr int V = kChunk<T>;
  const EndPlan& plan = P.plan;
  const MapShape& s = plan.shape;
  BlockShared& shared = *reinterpret_cast<BlockShared*>(shared_memory());
  uint64_t policy = cache_policy(P.stream);
  const bool relu = kWide ? kRelu : P.v.map.data != nullptr, has_dv = P.dv.map.data != nullptr;

  // This thread's place in a unit
  int columns = plan.slab / V, column = int(threadIdx.x) % columns, row = int(threadIdx.x) / columns;  // row: of the sums
  int slot = row / plan.lanes, lane = row - slot * plan.lanes;

  for (uint32_t unit = blockIdx.x; unit < plan.units; unit += gridDim.x) {
    MapUnit at(unit, plan);
    int64_t image = int64_t(at.group) * plan.images + slot, channel = int64_t(at.slab) * plan.slab + column * V;
    float sums[V] = {};

    if (slot < plan.images && image < s.batch && channel < s.channels) {
      int count = int(min(int64_t(V), s.channels - channel));
      const StridedMap &dv = P.dv.map, &v = P.v.map;
      const T* from = static_cast<const T*>(dv.data) + image * dv.stride_b + channel * dv.stride_c;
      const T* values = static_cast<const T*>(v.data) + image * v.stride_b + channel * v.stride_c;
      T* du = static_cast<T*>(P.du) + image * plan.positions * s.channels + channel;
      int first = int(at.part) * plan.part_size, last = min(plan.positions, first + plan.part_size);
      float gp[V];
#pragma unroll
      for (int i = 0; i < V; ++i) gp[i] = -0.0f;
      if (P.dp) load_channels(gp, P.dp + image * P.dp_stride_b, DType::F32, channel, P.dp_stride_c, count, P.dp_wide);
#pragma unroll
      for (int i = 0; i < V; ++i) gp[i] = divided(gp[i], plan.pixels, plan.mean);

      for (int i = first + lane; i < last; i += plan.lanes * kEndAtOnce) {
        // Load
        Chunk upstream[kEndAtOnce], value[kEndAtOnce];
#pragma unroll
        for (int j = 0; j < kEndAtOnce; ++j) {
          int pixel = i + j * plan.lanes;
          if constexpr (kWide) {
            int offset = pixel * int(s.channels);
            load_whole_if(upstream[j], pixel < last && has_dv, from + offset, policy);
            if constexpr (kRelu) load_whole_if(value[j], pixel < last, values + offset, policy);
          } else if (pixel < last) {
            int h = int(divide(uint32_t(pixel), plan.row)), w = pixel - h * int(plan.row.divisor);
            if (has_dv) load_few(upstream[j], from + h * dv.stride_h + w * dv.stride_w, count, P.dv.access, dv.stride_c);
            if (relu) load_few(value[j], values + h * v.stride_h + w * v.stride_w, count, P.v.access, v.stride_c);
          }
        }

        // Add, mask, store, sum
#pragma unroll
        for (int j = 0; j < kEndAtOnce; ++j) {
          int pixel = i + j * plan.lanes;
          if (j > 0 && pixel >= last) break;
          if (!has_dv) set_minus_zero<T>(upstream[j]);
          float d[V];
          Chunk out;
          end_gradient<T>(d, out, upstream[j], gp, value[j], relu);
          if constexpr (kWide)
            store_whole(du + pixel * int(s.channels), out);
          else
            store_few(du + pixel * s.channels, out, count, P.du_access);
#pragma unroll
          for (int k = 0; k < V; ++k) sums[k] += d[k];  // those behind `count` are nobody's
        }
      }
    }

    // Sum over the block, when nobody reads the last unit's sums any more
    if (!P.dshift) continue;
    __syncthreads();
    if (slot < plan.images)
#pragma unroll
      for (int i = 0; i < V; ++i) shared.rows()[row * plan.slab + column * V + i] = sums[i];
    __syncthreads();
    finish_sums(P, at, shared, plan.images * plan.lanes);
  }
}

}  // namespace interflow
