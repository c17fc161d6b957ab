// The pybind11 module _C: what was built, with what. A translation unit of its own, without torch headers.
#include <pybind11/pybind11.h>

#include <string>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of interflow_kernels.";
  m.def(
      "build_info",
      [] {
        pybind11::dict info;
        info["compiler"] = compiler();
        info["torch"] = INTERFLOW_TORCH_VERSION;
        info["stable_abi"] = INTERFLOW_STABLE_ABI;
        info["cuda"] = INTERFLOW_CUDA_VERSION;
        info["cuda_architectures"] = INTERFLOW_CUDA_ARCHITECTURES;
        info["cuda_reason"] = INTERFLOW_CUDA_REASON;
#if defined(__x86_64__)
        info["cpu_kernels"] = pybind11::make_tuple("baseline", "avx2");
#else
        info["cpu_kernels"] = pybind11::make_tuple("baseline");
#endif
        return info;
      },
      "Compiler, the torch built against, the stable ABI version, the CUDA version built with (empty: without) and for which GPUs, why so, and the CPU "
      "instruction sets compiled: a dict.");
  m.def("has_avx2", &has_avx2, "Whether this processor has AVX2, FMA and F16C.");
}
