// interflow_head, backward: at most three launches, none of which writes anything of a feature map's size.
//
//   ds[b,i,k] = A[i,k] dy[b,k] + dZ[b,i,k], or the gate's gradient: the gradient of Z
//   dp_i = ds_i W_i        dW_i = ds_i^T p_i        db[i,k] = sum_b ds[b,i,k]        dA[i,k] = sum_b dy[b,k] Z[b,i,k]
//
// 1 scores    only where Z is needed: for the gates (ds, and the terms of dM and dc), and for dA where dZ comes in
// 2 products  dp and dW. With G = dy^T p a linear mode without dZ has dW_i = A_i G_i and dA[i,k] = W_i[k,:] . G_i[k,:] + b_i[k] sum_b dy[b,k]: no Z
// 3 epilogue  db, dA and dc, from sums over the batch and from the terms that the first two left
// Every sum has one fixed order, in which the batch plays no part for an image's own gradients.
#include "interflow_head/cuda/epilogue.cuh"
#include "interflow_head/cuda/products.cuh"
#include "interflow_head/cuda/scores.cuh"
#include "common/cuda/launch.h"

namespace interflow {
namespace {

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_scores_kernel(const __grid_constant__ HeadBackward P) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  switch (P.tail.weight_dtype) {
    case DType::BF16: score_tile<__nv_bfloat16>(P, blockIdx.x, scratch); break;
    case DType::F16: score_tile<__half>(P, blockIdx.x, scratch); break;
    default: score_tile<float>(P, blockIdx.x, scratch); break;
  }
}

__global__ void __launch_bounds__(kHeadThreads, 2) interflow_head_products_kernel(const __grid_constant__ HeadBackward P) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  unsigned pooled = unsigned(pooled_tiles(P));
  if (blockIdx.x < pooled)
    pooled_tile(P, blockIdx.x, scratch);
  else
    weight_tile(P, blockIdx.x - pooled, scratch);
}

__global__ void __launch_bounds__(kHeadThreads, 4) interflow_head_epilogue_kernel(const __grid_constant__ HeadBackward P) {
  uint32_t* flag = reinterpret_cast<uint32_t*>(shared_memory());
  epilogue_block(P, flag, reinterpret_cast<float*>(shared_memory()) + 4);
}

// One block for each piece of work. resident_blocks is asked for what it does beside counting: it loads the kernel, which a launch must find loaded
// while a graph is being captured, and lets it have its shared memory.
cudaError_t launch_blocks(void (*kernel)(HeadBackward), const HeadBackward& P, int64_t blocks, int bytes, cudaStream_t stream) {
  cudaError_t error;
  resident_blocks(kernel, kHeadThreads, bytes, &error);
  if (error != cudaSuccess || blocks == 0) return error;
  return launch(kernel, {blocks, kHeadThreads, bytes, stream}, P);
}

}  // namespace

cudaError_t launch_head_scores(const HeadBackward& P, cudaStream_t stream) {
  return launch_blocks(interflow_head_scores_kernel, P, score_tiles(P.tail), 4 * ScoreShared::floats(P.tail.count, true), stream);
}

cudaError_t launch_head_products(const HeadBackward& P, cudaStream_t stream) {
  int floats = weight_tiles(P) ? weight_floats(P.tail) : 0, bytes = 4 * (floats > kPooledFloats ? floats : kPooledFloats);
  return launch_blocks(interflow_head_products_kernel, P, pooled_tiles(P) + weight_tiles(P), bytes, stream);
}

cudaError_t launch_head_epilogue(const HeadBackward& P, cudaStream_t stream) {
  return launch_blocks(interflow_head_epilogue_kernel, P, epilogue_blocks(P.tail), 4 * (4 + kEpilogueFloats), stream);
}

}  // namespace interflow
