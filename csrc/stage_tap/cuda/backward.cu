// stage_tap_backward's launcher. Its kernels: du is written once, from dm, dp and the mask, and summed for d(shift) on the way.
//
//   du = passes * dp / (H W) + is the maximum * dm, summed in fp32 and rounded once; dshift = sum of du over B, H, W in fp32
//
// Units, threads and pieces as in forward.cu. Because dp belongs to a whole map, d(shift) needs of each thread only how
// often it passed and the sum of the dm that did. Rows of sums meet in two levels: the block that arrives last among rows_at_once
// units adds theirs, and the last of these adds what came of it.
#include "stage_tap/cuda/backward_pixels.cuh"
#include "stage_tap/cuda/backward_planes.cuh"
#include "stage_tap/cuda/launch.cuh"

namespace interflow {
namespace {

template <class T, bool kPool>
cudaError_t launch_form(const TapBackwardParams& P, cudaStream_t stream) {
  bool wide = P.path == TapPath::Wide;
  if (P.plan.shape.channels_last)
    return launch_units(wide ? tap_pixels_backward<T, kPool, true> : tap_pixels_backward<T, kPool, false>, P, tap_pixels_shared(), stream);
  if (P.path == TapPath::Staged) return launch_units(tap_planes_backward<T, kPool, TapPath::Staged>, P, tap_planes_backward_shared<T>(P.plan, true), stream);
  return launch_units(wide ? tap_planes_backward<T, kPool, TapPath::Wide> : tap_planes_backward<T, kPool, TapPath::Narrow>, P,
                      tap_planes_backward_shared<T>(P.plan, false), stream);
}

template <class T>
cudaError_t launch_for(const TapBackwardParams& P, cudaStream_t stream) {
  return P.plan.max_pool ? launch_form<T, true>(P, stream) : launch_form<T, false>(P, stream);
}

}  // namespace

cudaError_t launch_tap_backward(const TapBackwardParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
