// stage_tap's launcher. Its kernels: one read of u gives m, the mask and p.
//
//   v = relu(u + shift), each step rounded to u's dtype; m = max_pool2d(v, 2, 2); p = mean of v over H, W, summed in fp32
//
// One kernel for each layout: NHWC a thread takes 16 bytes of channels of a window, so four 16-byte loads before the first use,
// and keeps its channels' sums; NCHW it takes tiles of two rows, two at a time, or one at a time from shared memory. Sums go through
// shared memory, and over the parts of a map through global memory to the block that arrives last: docs/decisions/cuda-tap.md.
#include "stage_tap/cuda/forward_pixels.cuh"
#include "stage_tap/cuda/forward_planes.cuh"
#include "stage_tap/cuda/launch.cuh"

namespace interflow {
namespace {

template <class T, bool kPool>
cudaError_t launch_form(const TapParams& P, cudaStream_t stream) {
  bool wide = P.path == TapPath::Wide, wide_masked = wide && P.mask;
  if (P.plan.shape.channels_last)
    return launch_units(wide_masked ? tap_pixels<T, kPool, true, true> : wide ? tap_pixels<T, kPool, true, false> : tap_pixels<T, kPool, false, true>, P,
                        tap_pixels_shared(), stream);
  auto kernel = wide_masked                      ? tap_planes<T, kPool, TapPath::Wide, true>
                : wide                           ? tap_planes<T, kPool, TapPath::Wide, false>
                : P.path == TapPath::Staged      ? tap_planes<T, kPool, TapPath::Staged, true>
                                                 : tap_planes<T, kPool, TapPath::Narrow, true>;
  return launch_units(kernel, P, tap_planes_shared<T>(P.plan, P.path == TapPath::Staged), stream);
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
