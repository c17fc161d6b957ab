// All kernels of the stage end for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include "stage_end/cpu/kernels.h"

#include "common/cpu/isa_begin.h"

#include "common/cpu/long_sum.h"

#include "common/cpu/map_rows.h"

#include "stage_end/cpu/element.h"

#include "stage_end/cpu/planes.h"

#include "stage_end/cpu/pixels.h"

#include "stage_end/cpu/units.h"

#include "common/cpu/isa_end.h"

#define STAGE_END_TABLE(isa) {isa::end_unit, isa::end_backward_unit}
