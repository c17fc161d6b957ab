// stage_end's launcher. Its kernels: one read of u, and of the residual where there is one, gives v and p.
//
//   v = act((u + shift) + residual), each step rounded to u's dtype; p = mean of v over H, W, summed in fp32
//
// One kernel for each layout. NHWC: a thread keeps 16 bytes of channels and their sums, four pixels on their way at a time. NCHW: the planes of a unit are
// one run, four chunks of 16 bytes on their way at a time, and each leaves a sum for its plane in shared memory. Over the parts of a
// map, where one is large, sums go through global memory to the block that arrives last.
#include "stage_end/cuda/forward_pixels.cuh"
#include "stage_end/cuda/forward_planes.cuh"
#include "stage_end/cuda/launch.cuh"

namespace interflow {
namespace {

template <class T>
cudaError_t launch_for(const EndParams& P, cudaStream_t stream) {
  bool residual = P.residual.map.data;
  int bytes = end_shared_bytes(P.plan);
  if (P.plan.shape.channels_last) {
    auto kernel = !P.wide ? end_pixels<T, true, false> : residual ? end_pixels<T, true, true> : end_pixels<T, false, true>;
    return launch_units(kernel, P, bytes, stream);
  }
  auto kernel = !P.wide ? end_planes<T, true, false> : residual ? end_planes<T, true, true> : end_planes<T, false, true>;
  return launch_units(kernel, P, bytes, stream);
}

}  // namespace

cudaError_t launch_end(const EndParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
