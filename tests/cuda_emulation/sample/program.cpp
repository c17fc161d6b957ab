// The host side of random programs.
#include "program.h"

#include "common/cuda/host.h"

namespace interflow {
namespace {

std::vector<int64_t> logged;

// Operations [steps, blocks * 64] run to their end, or to the first fault.
void program(const Tensor& operations, int64_t words) {
  OnDevice device(operations);
  logged.clear();
  ProgramParams P{static_cast<const int64_t*>(readable(operations)), counters(device.device(), device.stream(), words), operations.size(0)};
  check_launch(launch_program(P, operations.size(1) / kProgramThreads, device.stream()), "program", "program_kernel");
}

// [n]: which operations the last program did, in this order.
Tensor program_log(const Tensor& like) {
  Tensor log = new_tensor(like, {int64_t(logged.size())}, ScalarType::Long);
  std::copy(logged.begin(), logged.end(), static_cast<int64_t*>(log.mutable_data_ptr()));
  return log;
}

}  // namespace

void log_operation(int64_t at) { logged.push_back(at); }

}  // namespace interflow

#define INTERFLOW_PROGRAM_IN(library, m) STABLE_TORCH_LIBRARY(library, m)
INTERFLOW_PROGRAM_IN(INTERFLOW_LIBRARY, m) {
  m.def("program(Tensor operations, int words) -> ()");
  m.def("program_log(Tensor like) -> Tensor");
}
INTERFLOW_REGISTER(m) {
  m.impl("program", TORCH_BOX(&interflow::program));
  m.impl("program_log", TORCH_BOX(&interflow::program_log));
}
