// stage_tap's launcher. Its kernels: one read of u gives m, the mask and p.
//
//   v = relu(u + shift), each step rounded to u's dtype; m = max_pool2d(v, 2, 2); p = mean of v over H, W, summed in fp32
//
// One kernel for each layout: NHWC a thread takes 16 bytes of channels of a window, so four 16-byte loads before the first use,
// and keeps its channels' sums; NCHW it takes tiles of two rows, two at a time. Sums go through shared memory, and over the parts
// of a map through global memory to the block that arrives last: docs/decisions.md.
#include <algorithm>

#include "launch.h"
#include "stage_tap_fwd_pixels.cuh"
#include "stage_tap_fwd_planes.cuh"

namespace interflow {
namespace {

template <class T, bool kPool, bool kWide, bool kMask>
cudaError_t launch_typed(const TapParams& P, cudaStream_t stream) {
  auto kernel = P.plan.shape.channels_last ? tap_pixels<T, kPool, kWide, kMask> : tap_planes<T, kPool, kWide, kMask>;
  cudaError_t error = cudaSuccess;
  int64_t resident = resident_blocks(kernel, kTapThreads, int(sizeof(TapShared)), &error);
  if (error != cudaSuccess) return error;
  return launch(kernel, {std::min(int64_t(P.plan.units), resident), kTapThreads, int(sizeof(TapShared)), stream}, P);
}

template <class T, bool kPool>
cudaError_t launch_form(const TapParams& P, cudaStream_t stream) {
  if (P.access < 16) return launch_typed<T, kPool, false, true>(P, stream);
  return P.mask ? launch_typed<T, kPool, true, true>(P, stream) : launch_typed<T, kPool, true, false>(P, stream);
}

template <class T>
cudaError_t launch_for(const TapParams& P, cudaStream_t stream) {
  return P.plan.max_pool ? launch_form<T, true>(P, stream) : launch_form<T, false>(P, stream);
}

}  // namespace

cudaError_t launch_tap(const TapParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
