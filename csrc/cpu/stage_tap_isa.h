// All kernels of the stage tap for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include "stage_tap_kernels.h"

#include "isa_begin.h"

#include "long_sum.h"

#include "stage_tap_window.h"

#include "stage_tap_planes.h"

#include "stage_tap_pixels.h"

#include "isa_end.h"

#define STAGE_TAP_TABLE(isa) {isa::tap_unit, isa::tap_backward_unit}
