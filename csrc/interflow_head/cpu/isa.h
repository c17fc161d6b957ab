// All kernels of the head for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include "interflow_head/cpu/kernels.h"

#include "common/cpu/isa_begin.h"

#include "common/cpu/long_sum.h"

#include "interflow_head/cpu/pool.h"

#include "interflow_head/cpu/gate.h"

#include "interflow_head/cpu/product.h"

#include "common/cpu/isa_end.h"

#define INTERFLOW_HEAD_TYPED(isa, Acc) {isa::product<Acc>, isa::gate_backward<Acc>, isa::pooled_gradient<Acc>, isa::weight_gradient<Acc>}
#define INTERFLOW_HEAD_TABLE(name, isa) {name, isa::pool_unit, INTERFLOW_HEAD_TYPED(isa, float), INTERFLOW_HEAD_TYPED(isa, double)}
