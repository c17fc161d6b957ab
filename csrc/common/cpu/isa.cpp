// The instruction set, chosen once.
#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace interflow {

bool use_avx2() {
#if defined(__x86_64__)
  static const bool chosen = [] {
    const char* asked = std::getenv("INTERFLOW_CPU_ISA");
    bool narrow = asked && std::strcmp(asked, "baseline") == 0;
    return !narrow && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }();
  return chosen;
#else
  return false;
#endif
}

}  // namespace interflow
