// stage_end_backward's launcher. Its kernels: one read of dv, and of v where it masks, gives du, summed for d(shift) on the way.
//
//   d = dv + dp / (H W) where v passes, else 0; du = d, rounded once; dshift = sum of d over B, H, W in fp32
//
// Units, threads and chunks as in forward.cu. Rows of sums meet in two levels, as stage_tap_backward's do: common/cuda/map_sums.cuh. Two blocks a
// multiprocessor are asked for, not three: beside eight loads of 16 bytes on their way, gradients of means and sums take more than 80 registers on some
// architectures, and two blocks have 64 KB on their way.
#include "stage_end/cuda/backward_pixels.cuh"
#include "stage_end/cuda/backward_planes.cuh"
#include "stage_end/cuda/launch.cuh"

namespace interflow {
namespace {

template <class T>
cudaError_t launch_for(const EndBackwardParams& P, cudaStream_t stream) {
  bool relu = P.v.map.data;
  int bytes = end_shared_bytes(P.plan);
  if (P.plan.shape.channels_last) {
    auto kernel = !P.wide ? end_pixels_backward<T, true, false> : relu ? end_pixels_backward<T, true, true> : end_pixels_backward<T, false, true>;
    return launch_units(kernel, P, bytes, stream);
  }
  auto kernel = !P.wide ? end_planes_backward<T, true, false> : relu ? end_planes_backward<T, true, true> : end_planes_backward<T, false, true>;
  return launch_units(kernel, P, bytes, stream);
}

}  // namespace

cudaError_t launch_end_backward(const EndBackwardParams& P, cudaStream_t stream) {
  switch (P.plan.dtype) {
    case DType::BF16: return launch_for<__nv_bfloat16>(P, stream);
    case DType::F16: return launch_for<__half>(P, stream);
    default: return launch_for<float>(P, stream);
  }
}

}  // namespace interflow
