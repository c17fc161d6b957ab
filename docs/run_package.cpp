// Serves an AOTInductor package of `interflow export --format aoti` without Python.
//
//   run_package LIBRARY PACKAGE BATCH CHANNELS SIZE < images > scores
//
// LIBRARY: what interflow_kernels.library_path() names. images: BATCH * CHANNELS * SIZE * SIZE numbers of fp32; scores: BATCH lines.
// Build, with T=$(python -c "import torch; print(torch.__path__[0])"):
//   g++ -std=c++20 -I$T/include run_package.cpp -o run_package -L$T/lib -Wl,-rpath,$T/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl
#include <ATen/ATen.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>
#include <cstdlib>

int main(int count, char** words) {
  if (count != 6) {
    std::fprintf(stderr, "usage: run_package LIBRARY PACKAGE BATCH CHANNELS SIZE < images > scores\n");
    return 2;
  }
  // The operators register themselves while their library loads.
  if (!dlopen(words[1], RTLD_NOW | RTLD_GLOBAL)) {
    std::fprintf(stderr, "run_package: %s\n", dlerror());
    return 1;
  }
  torch::inductor::AOTIModelPackageLoader network(words[2]);

  long batch = std::atol(words[3]), channels = std::atol(words[4]), size = std::atol(words[5]);
  at::Tensor images = at::empty({batch, channels, size, size});
  if (std::fread(images.data_ptr(), sizeof(float), images.numel(), stdin) != size_t(images.numel())) {
    std::fprintf(stderr, "run_package: stdin ended before %ld images\n", batch);
    return 1;
  }

  at::Tensor scores = network.run({images})[0];  // [B, K]
  for (long b = 0; b < scores.size(0); ++b)
    for (long k = 0; k < scores.size(1); ++k) std::printf("%.9g%c", scores[b][k].item<float>(), k + 1 < scores.size(1) ? ' ' : '\n');
  return 0;
}
