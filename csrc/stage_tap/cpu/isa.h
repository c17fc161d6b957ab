// All kernels of the stage tap for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include "stage_tap/cpu/kernels.h"

#include "common/cpu/isa_begin.h"

#include "common/cpu/long_sum.h"

#include "common/cpu/map_rows.h"

#include "stage_tap/cpu/window.h"

#include "stage_tap/cpu/planes.h"

#include "stage_tap/cpu/pixels.h"

#include "common/cpu/isa_end.h"

#define STAGE_TAP_TABLE(isa) {isa::tap_unit, isa::tap_backward_unit}
