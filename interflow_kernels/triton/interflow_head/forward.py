"""interflow_head in Triton, the host side: plan, allocate, launch, return. Arguments and results are the raw operator's.

Two launches: one pools every map, one multiplies and aggregates; the first falls away where up to four features are all pooled
already, as a StageTap gives them. A plan is what follows from shapes, strides, dtypes and device, checks included; it is made
once and kept.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tiles
from ..common.checks import Description, contiguous, described, description
from ..common.launch import Launcher, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.products import PARTS, products_on
from . import forward_kernels as kernels
from .parameters import MAX_STAGES, MODES, check_parameters, dtype_name
from .pool import check_features, pooling_of


class _Plan(NamedTuple):
    y: Allocation
    branches: Allocation
    pooled: Allocation
    tail: Launcher | None = None  # None: nothing to do
    pool: Launcher | None = None  # None: all features are pooled already
    partial: Allocation | None = None  # sums of parts of maps
    without: tuple[None, ...] = ()  # what stands in a launch's arguments for features that are not there
    is_contiguous: bool = True  # all parameters are


@tiles.cached
def _plan(
    features_fields: Any, parameters_fields: Any, attention: str, bins: tuple[int, ...], need_branches: bool, dtype: torch.dtype | None, fill: bool
) -> _Plan:
    # Check
    name = "interflow_head"
    features, parameters = [Description(*x) for x in features_fields], [description(t) for t in parameters_fields]
    n, weight = len(features), parameters[0]
    assert weight is not None
    batch = check_features(name, features, bins, weight.device, "weight")
    pooling = pooling_of(features, (bins[0], bins[1]))
    width = pooling.columns[-1]
    check_parameters(name, parameters, attention, n, width)

    # Sizes
    classes = weight.shape[0]
    dtype = weight.dtype if dtype is None else dtype
    new = Memory(weight.device, fill)
    y, pooled = new.dense((batch, classes), dtype), new.dense((batch, width), torch.float32)
    branches = new.dense((batch, n, classes), dtype) if need_branches else new.nothing(dtype)
    if batch == 0:
        return _Plan(y, branches, pooled)
    partial = new.dense((batch, pooling.partial_d), torch.float32) if pooling.partial_d else None
    direct = n <= 4 and all(len(x.shape) == 2 for x in features)
    pool = Launcher(kernels.head_pool, batch * pooling.first[-1], (n, pooling.stages, pooling.first, width, pooling.partial_d), *pooling.run)
    tile, run = tiles.head_product("head_tail", classes, width, dtype_name(weight.dtype), attention == "gated")
    strides = tuple(s for x in features for s in x.strides) if direct else ()
    tables = (pooling.columns, pooling.parts, pooling.pixels, pooling.partial_columns, pooling.partial_d)
    constants = (n, direct, strides, *tables, classes, MODES[attention], tiles.power_of_two(n), *tile, products_on(weight.device) == PARTS)
    tail = Launcher(kernels.head_tail, -(-batch // tile[0]) * -(-classes // tile[1]), constants, *run)
    without = (None,) * ((4 if direct else MAX_STAGES) - n)
    is_contiguous = all(t is None or t.is_contiguous() for t in parameters)
    return _Plan(y, branches, pooled, tail, None if direct else pool, partial, without, is_contiguous)


def interflow_head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: Sequence[int],
    need_branches: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """features n of [B, C_i, H_i, W_i] or [B, D_i], weight [K, D] -> y [B, K], branches [B, n, K] or [0], pooled [B, D] fp32."""
    parameters = (weight, bias, attention_weight, attention_bias)
    plan = _plan(tuple(map(described, features)), tuple(map(described, parameters)), attention, tuple(pool_size), need_branches, dtype, fill_is_on())
    guard = elsewhere(weight)
    if guard is not None:
        with guard:
            return interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, dtype)
    y, branches, pooled = plan.y(), plan.branches(), plan.pooled()
    if plan.tail is not None:
        partial = None if plan.partial is None else plan.partial()
        sources: Sequence[Tensor | None] = (*features, *plan.without)
        if plan.pool is not None:
            plan.pool(*sources, pooled, partial)
            sources = _NO_SOURCES
        given = parameters if plan.is_contiguous else map(contiguous, parameters)
        plan.tail(*sources, pooled, partial, *given, y, branches if need_branches else None, features[0].shape[0])
    return y, branches, pooled


_NO_SOURCES = (None,) * 4  # of the tail, where a pool went before
