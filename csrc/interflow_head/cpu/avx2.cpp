// The head's kernels for AVX2 with FMA and F16C, chosen at run time. The target is set for this file's own functions only,
// after every system header, so that no shared inline function is compiled for it.
#if defined(__x86_64__)
#define INTERFLOW_ISA avx2
#define INTERFLOW_AVX2
#include "interflow_head/cpu/isa.h"

namespace interflow {
const HeadKernels head_kernels_avx2 = INTERFLOW_HEAD_TABLE("avx2", avx2);
}
#endif
