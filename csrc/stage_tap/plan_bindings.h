// For bindings.cpp: how a GPU would share out the stage tap's work.
#pragma once
#include <pybind11/pybind11.h>

#include "stage_tap/cuda/plan.h"

namespace interflow {

inline TapPlan tap_plan(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t element, bool max_pool, bool channels_last) {
  TapShape shape{batch, channels, height, width, channels_last};
  bool fits = std::min({channels, height, width}) >= 1 && height <= kMostMapPixels && width <= kMostMapPixels && height * width <= kMostMapPixels;
  int64_t units = 0;
  TapPlan plan{};
  if (fits && batch >= 1) plan = plan_tap(shape, element == 4 ? DType::F32 : DType::BF16, max_pool, units);
  if (units < 1 || units >= int64_t(1) << 31) throw pybind11::value_error("the shape is beyond the kernel's numbers, or empty");
  return plan;
}

inline void define_tap_plan(pybind11::module_& m) {
  pybind11::class_<TapPlan>(m, "TapPlan", "How the stage tap's work is cut into units: see csrc/stage_tap/cuda/plan.h.")
      .def_readonly("slab", &TapPlan::slab)
      .def_readonly("images", &TapPlan::images)
      .def_readonly("lanes", &TapPlan::lanes)
      .def_readonly("positions", &TapPlan::positions)
      .def_readonly("part_size", &TapPlan::part_size)
      .def_readonly("parts", &TapPlan::parts)
      .def_readonly("slabs", &TapPlan::slabs)
      .def_readonly("units", &TapPlan::units)
      .def_property_readonly("staged", [](const TapPlan& plan) { return plan.staged.u > 0; })
      .def_property_readonly("threads", [](const TapPlan&) { return kMapThreads; })
      .def_property_readonly("vector", [](const TapPlan& plan) { return tap_vector(plan.dtype, plan.max_pool); });
  m.def("tap_plan", &tap_plan, pybind11::arg("batch"), pybind11::arg("channels"), pybind11::arg("height"), pybind11::arg("width"), pybind11::arg("element"),
        pybind11::arg("max_pool"), pybind11::arg("channels_last"), "The stage tap's plan of a map [B, C, H, W] whose elements have so many bytes.");
}

}  // namespace interflow
