// All kernels of the head for the instruction set INTERFLOW_ISA. Included by one .cpp for each set.
#pragma once
#include "interflow_head_kernels.h"

#include "isa_begin.h"

#include "long_sum.h"

#include "interflow_head_pool.h"

#include "interflow_head_gate.h"

#include "interflow_head_product.h"

#include "isa_end.h"

#define INTERFLOW_HEAD_TYPED(isa, Acc) {isa::product<Acc>, isa::gate_backward<Acc>, isa::pooled_gradient<Acc>, isa::weight_gradient<Acc>}
#define INTERFLOW_HEAD_TABLE(name, isa) {name, isa::pool_unit, INTERFLOW_HEAD_TYPED(isa, float), INTERFLOW_HEAD_TYPED(isa, double)}
