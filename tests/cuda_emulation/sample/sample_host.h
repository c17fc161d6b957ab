// Launches a sample kernel by its name.
#pragma once
#include <driver_types.h>

#include <string>

#include "sample.h"

namespace interflow {

cudaError_t launch_sample(const std::string& kernel, const SampleParams& P, cudaStream_t stream);

}  // namespace interflow
