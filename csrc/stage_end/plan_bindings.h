// For bindings.cpp: how a GPU would share out the stage end's work.
#pragma once
#include <pybind11/pybind11.h>

#include "stage_end/cuda/plan.h"

namespace interflow {

inline EndPlan end_plan(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t element, bool channels_last) {
  MapShape shape{batch, channels, height, width, channels_last};
  bool fits = std::min({channels, height, width}) >= 1 && height <= kMostMapPixels && width <= kMostMapPixels && height * width <= kMostMapPixels;
  int64_t units = 0;
  EndPlan plan{};
  if (fits && batch >= 1) plan = plan_end(shape, element == 4 ? DType::F32 : DType::BF16, units);
  if (units < 1 || units >= int64_t(1) << 31) throw pybind11::value_error("the shape is beyond the kernel's numbers, or empty");
  return plan;
}

inline void define_end_plan(pybind11::module_& m) {
  pybind11::class_<EndPlan>(m, "EndPlan", "How the stage end's work is cut into units: see csrc/stage_end/cuda/plan.h.")
      .def_readonly("slab", &EndPlan::slab)
      .def_readonly("images", &EndPlan::images)
      .def_readonly("lanes", &EndPlan::lanes)
      .def_readonly("positions", &EndPlan::positions)
      .def_readonly("part_size", &EndPlan::part_size)
      .def_readonly("parts", &EndPlan::parts)
      .def_readonly("slabs", &EndPlan::slabs)
      .def_readonly("units", &EndPlan::units)
      .def_readonly("slots", &EndPlan::slots)
      .def_readonly("most", &EndPlan::most)
      .def_readonly("numbers", &EndPlan::numbers)
      .def_readonly("whole", &EndPlan::whole)
      .def_property_readonly("threads", [](const EndPlan&) { return kMapThreads; })
      .def_property_readonly("vector", [](const EndPlan& plan) { return end_vector(plan.dtype); });
  m.def("end_plan", &end_plan, pybind11::arg("batch"), pybind11::arg("channels"), pybind11::arg("height"), pybind11::arg("width"), pybind11::arg("element"),
        pybind11::arg("channels_last"), "The stage end's plan of a map [B, C, H, W] whose elements have so many bytes.");
}

}  // namespace interflow
