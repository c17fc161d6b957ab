// The head's kernels for every processor of the platform: SSE2 on x86-64, NEON on aarch64.
#define INTERFLOW_ISA baseline
#include "interflow_head/cpu/isa.h"

namespace interflow {
const HeadKernels head_kernels_baseline = INTERFLOW_HEAD_TABLE("baseline", baseline);
}
