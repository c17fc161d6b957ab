// The stage end's kernels for AVX2 with FMA and F16C, chosen at run time. The target is set for this file's own functions
// only, after every system header, so that no shared inline function is compiled for it.
#if defined(__x86_64__)
#define INTERFLOW_ISA avx2
#define INTERFLOW_AVX2
#include "stage_end/cpu/isa.h"

namespace interflow {
const EndKernels end_kernels_avx2 = STAGE_END_TABLE(avx2);
}
#endif
