// The pybind11 module _C: what was built, with what, and how a GPU would share out the head's work. A translation unit of its own, without torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "interflow_head/cuda/schedule.h"
#include "stage_end/plan_bindings.h"
#include "stage_tap/plan_bindings.h"

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

// --- the CUDA head's schedule ------------------------------------------------------------------------------------------------
using interflow::HeadSchedule;

HeadSchedule schedule(const std::vector<std::vector<int64_t>>& maps, int64_t batch, int64_t classes, int64_t weight_bytes, int wide) {
  std::vector<interflow::Stage> stages;
  for (const auto& m : maps) {
    if (m.size() != 11) throw pybind11::value_error("every map must be 11 numbers: channels, height, width, element size, strides of b, c, h, w, bins, address");
    interflow::DType dtype = m[3] == 4 ? interflow::DType::F32 : interflow::DType::BF16;
    stages.push_back({reinterpret_cast<const void*>(m[10]), dtype, m[0], m[1], m[2], m[4], m[5], m[6], m[7], m[8], m[9], 0});
  }
  if (stages.empty() || stages.size() > interflow::kMaxStages || batch < 1) throw pybind11::value_error("maps must be 1 to 16, batch at least 1");
  HeadSchedule plan{};
  if (!interflow::schedule_head(plan, stages.data(), int(stages.size()), batch, classes, weight_bytes, wide)) throw pybind11::value_error("beyond the kernel's numbers");
  return plan;
}

void define_schedule(pybind11::module_& m) {
  using interflow::StageSchedule;
  pybind11::class_<StageSchedule>(m, "StageSchedule", "How one stage is pooled: see csrc/interflow_head/cuda/schedule.h.")
      .def_readonly("pixels", &StageSchedule::pixels)
      .def_readonly("flat", &StageSchedule::flat)
      .def_readonly("vectors", &StageSchedule::vectors)
      .def_readonly("vector", &StageSchedule::vector)
      .def_property_readonly("steps_each", [](const StageSchedule&) { return interflow::kSteps; })
      .def_readonly("parts", &StageSchedule::parts)
      .def_readonly("slabs", &StageSchedule::slabs)
      .def_readonly("bins", &StageSchedule::bins)
      .def_property_readonly("lanes", &StageSchedule::lanes)
      .def_property_readonly("steppers", &StageSchedule::steppers)
      .def_property_readonly("items", &StageSchedule::items)
      .def_property_readonly("width", &StageSchedule::width);
  pybind11::class_<HeadSchedule>(m, "HeadSchedule", "The whole schedule of a forward launch.")
      .def_readonly("group_images", &HeadSchedule::group_images)
      .def_readonly("groups", &HeadSchedule::groups)
      .def_readonly("tickets", &HeadSchedule::tickets)
      .def_readonly("reductions", &HeadSchedule::reductions)
      .def_property_readonly("counters", &HeadSchedule::counters)
      .def_property_readonly("stages", [](const HeadSchedule& s) { return std::vector<StageSchedule>(s.stages, s.stages + s.count); })
      .def("images", &HeadSchedule::images)
      .def("events", &HeadSchedule::events)
      .def("tile_classes", &HeadSchedule::tile_classes)
      .def("tile_count", &HeadSchedule::tile_count)
      .def("done_counter", &HeadSchedule::done_counter)
      .def("reduction_counter", &HeadSchedule::reduction_counter)
      .def("ticket", [](const HeadSchedule& s, uint32_t t) {
        auto ticket = s.ticket(t);
        return pybind11::make_tuple(ticket.pool, ticket.group, ticket.index);
      })
      .def("unit", [](const HeadSchedule& s, uint32_t group, uint32_t u) {
        auto unit = s.unit(group, u);
        return pybind11::make_tuple(unit.stage, unit.block, unit.bin, unit.part, unit.slab, unit.reduction, unit.counter);
      });
  m.def("head_schedule", &schedule, pybind11::arg("maps"), pybind11::arg("batch"), pybind11::arg("classes"), pybind11::arg("weight_bytes"), pybind11::arg("wide"),
        "The schedule of maps, each 11 numbers: channels, height, width, element size, strides of b, c, h, w in elements, bins_h, bins_w, address.");
  m.def("group_images", &interflow::group_images, pybind11::arg("batch"), pybind11::arg("weight_bytes"), "Images of a group: the predicate for large weights.");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information of interflow_kernels, and the CUDA head's schedule.";
  define_schedule(m);
  interflow::define_tap_plan(m);
  interflow::define_end_plan(m);
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
