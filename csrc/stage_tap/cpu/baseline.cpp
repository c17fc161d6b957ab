// The stage tap's kernels for every processor of the platform: SSE2 on x86-64, NEON on aarch64.
#define INTERFLOW_ISA baseline
#include "stage_tap/cpu/isa.h"

namespace interflow {
const TapKernels tap_kernels_baseline = STAGE_TAP_TABLE(baseline);
}
