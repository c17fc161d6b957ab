// The stage end's kernels for every processor of the platform: SSE2 on x86-64, NEON on aarch64.
#define INTERFLOW_ISA baseline
#include "stage_end/cpu/isa.h"

namespace interflow {
const EndKernels end_kernels_baseline = STAGE_END_TABLE(baseline);
}
