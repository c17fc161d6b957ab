// Which instruction set this process runs.
#pragma once

namespace interflow {

// Whether the AVX2 kernels run: the processor has AVX2, FMA and F16C, and INTERFLOW_CPU_ISA=baseline does not forbid it.
bool use_avx2();

}  // namespace interflow
