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
from ..common.checks import Description, check_dtype, contiguous, described, description, fail
from ..common.launch import Launcher, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.products import PARTS, products_on
from . import forward_kernels as kernels
from .parameters import MAX_STAGES, MODES, check_parameters, dtype_name


class _Pooling(NamedTuple):
    """How the features are pooled: tables with an entry for each stage, constants of the kernels."""

    stages: tuple[int, ...]  # STAGE_FIELDS numbers each
    first: tuple[int, ...]  # units of an image before each stage, and of all
    columns: tuple[int, ...]  # of pooled, before each stage, and of all
    parts: tuple[int, ...]
    pixels: tuple[int, ...]
    partial_columns: tuple[int, ...]
    partial_d: int
    run: tuple[int, int]  # warps, stages


def _pooling(features: Sequence[Description], bins: tuple[int, int]) -> _Pooling:
    stages: list[int] = []
    first, columns, parts, pixels, partial_columns = [0], [0], [], [], []
    partial_d = 0
    runs = []
    for x in features:
        channels, (height, width) = x.shape[1], x.shape[2:] or (1, 1)
        sb, sc, sh, sw = x.strides if len(x.shape) == 4 else (*x.strides, 1, 1)
        several = len(x.shape) == 4 and bins != (1, 1)
        count = bins[0] * bins[1] if len(x.shape) == 4 else 1
        if width == 1 and height > 1:  # one row
            height, width, sh, sw = (1, height, 1, sh) if not several else (height, width, sh, sw)
        window = (height // bins[0] + 2) * (width // bins[1] + 2) if several else None
        part, run = tiles.head_pool(
            channels, height, width, x.dtype.itemsize, sc == 1 and channels > 1, None if window is None else min(window, height * width)
        )
        wide = 2 * ((channels + 1024) * sc + (height + 1) * sh + (width + 4096) * sw) >= 2**31
        stages += [channels, height, width, sb, sc, sh, sw, *part, columns[-1], partial_d, int(wide), *(bins if several else (1, 1))]
        first.append(first[-1] + -(-channels // part[3]) * (count if several else part[0]))
        columns.append(columns[-1] + channels * count)
        parts.append(part[0])
        runs.append(run)
        pixels.append(height * width)
        partial_columns.append(partial_d)
        partial_d += part[0] * channels if part[0] > 1 else 0
    run = max(warps for warps, _ in runs), max(ahead for _, ahead in runs)  # of one launch for all
    return _Pooling(tuple(stages), tuple(first), tuple(columns), tuple(parts), tuple(pixels), tuple(partial_columns), partial_d, run)


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
    if not (1 <= n <= MAX_STAGES):
        fail(f"{name}: features must name 1 to {MAX_STAGES} stages, got {n}")
    if not (len(bins) == 2 and min(bins) > 0):
        fail(f"{name}: pool_size must be two numbers of at least 1, got {list(bins)}")
    batch = features[0].shape[0] if features[0].shape else 0
    for i, x in enumerate(features):
        if len(x.shape) not in (2, 4):
            fail(f"{name}: features[{i}] must be [B, C, H, W] or, already pooled, [B, D_i], got {list(x.shape)}")
        if not (len(x.shape) == 2 or min(x.shape[2:]) > 0):
            fail(f"{name}: features[{i}] must have H and W of at least 1, got {list(x.shape)}")
        if x.shape[0] != batch:
            fail(f"{name}: features[{i}] must have the batch of features[0], {batch}, got {list(x.shape)}")
        if x.device != weight.device:
            fail(f"{name}: features[{i}] must be on the device of weight, {weight.device}, got {x.device}")
        check_dtype(name, f"features[{i}]", x.dtype)
    pooling = _pooling(features, (bins[0], bins[1]))
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
