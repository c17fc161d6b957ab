"""interflow_head_backward in Triton, the host side. At most three launches, fewer where less is asked for:

1. where Z is needed (gated, or the branches have a gradient of their own beside the attention's): dscores and sums for the attention;
2. dpooled, dweight, dbias side by side; 3. the attention's gradients from rows of sums.

A plan is what follows from shapes, strides, dtypes, device and what is asked for, checks included; it is made once and kept.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tiles
from ..common.checks import Description, contiguous, described, description, fail
from ..common.launch import Launcher, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.products import MULTIPLY_ADDS, PARTS, products_on
from . import backward_kernels as kernels
from .parameters import MAX_STAGES, MODES, check_parameters, dtype_name

FP32 = torch.float32


def _columns(widths: Sequence[int], wide: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Columns and tiles of `wide` columns before each stage, and the power of two that divides every stage's first column."""
    columns, first = [0], [0]
    for width in widths:
        columns.append(columns[-1] + width)
        first.append(first[-1] + max(1, -(-width // wide)))
    return tuple(columns), tuple(first), math.gcd(wide, *columns[:-1])


class _Plan(NamedTuple):
    results: tuple[Allocation, ...]  # dpooled, dweight, dbias, dattention_weight, dattention_bias; [0] where not asked for
    given: tuple[bool, ...]  # which of them are written
    zeros: tuple[int, ...]  # which are zero
    scores: Launcher | None = None
    of_gates: Allocation | None = None  # [B, n, K] fp32: the gradient of Z, that of the gates' arguments, the gates' shares; None without gates
    sums: Allocation | None = None  # rows of sums for the attention, which `scores` writes
    gradients: Launcher | None = None
    rows: Allocation | None = None  # likewise, which `gradients` writes
    attention: Launcher | None = None
    summed: int = 0  # tiles of images, or rows, that the attention's launch adds up


def _check(
    upstream: tuple[Description | None, Description | None],
    pooled: Description,
    parameters: list[Description | None],
    attention: str,
    widths: tuple[int, ...],
    feature_stages: tuple[int, ...],
) -> None:
    name, n, width = "interflow_head_backward", len(widths), sum(widths)
    if not (1 <= n <= MAX_STAGES):
        fail(f"{name}: widths must name 1 to {MAX_STAGES} stages, got {n}")
    if not (min(widths) >= 0):
        fail(f"{name}: widths must be at least 0, got {list(widths)}")
    check_parameters(name, parameters, attention, n, width)
    if not (len(pooled.shape) == 2 and pooled.shape[1] == width and pooled.dtype == FP32):
        fail(f"{name}: pooled must be [B, {width}] in fp32 as interflow_head returned it, got {list(pooled.shape)} in {pooled.dtype}")
    weight = parameters[0]
    assert weight is not None
    batch, classes = pooled.shape[0], weight.shape[0]
    for argument, t, shape in zip(("dy", "dbranches"), upstream, ([batch, classes], [batch, n, classes]), strict=True):
        if not (t is None or list(t.shape) == shape):
            fail(f"{name}: {argument} must be {shape}, got {None if t is None else list(t.shape)}")
    if not (all(0 <= i < n for i in feature_stages)):
        fail(f"{name}: feature_stages must be of 0 to {n - 1}, got {list(feature_stages)}")


@tiles.cached
def _plan(
    upstream_fields: Any,
    pooled_fields: Any,
    parameters_fields: Any,
    attention: str,
    widths: tuple[int, ...],
    feature_stages: tuple[int, ...],
    needs: tuple[bool, bool, bool],
    fill: bool,
) -> _Plan:
    (dy, dbranches), pooled, parameters = map(description, upstream_fields), Description(*pooled_fields), [description(t) for t in parameters_fields]
    _check((dy, dbranches), pooled, parameters, attention, widths, feature_stages)
    weight = parameters[0]
    assert weight is not None
    n, width = len(widths), sum(widths)
    batch, classes = pooled.shape[0], weight.shape[0]

    # Results
    new = Memory(weight.device, fill)
    need_weight, need_bias, need_attention = needs
    wanted = (len(feature_stages) > 0, need_weight, need_bias, need_attention, need_attention)
    like = (pooled, *parameters)
    results = tuple(
        new.nothing(FP32 if t is None else t.dtype) if t is None or not asked else new.dense(t.shape, t.dtype) for t, asked in zip(like, wanted, strict=True)
    )
    given = tuple(t is not None and asked and math.prod(t.shape) > 0 for t, asked in zip(like, wanted, strict=True))
    if batch == 0 or (dy is None and dbranches is None):
        return _Plan(results, given, tuple(range(5)))
    dpooled, dweight, dbias, dattention_weight, dattention_bias = given

    # Sizes
    mode = MODES[attention]
    gated = mode == MODES["gated"] and dy is not None
    attends = dy is not None and (dattention_weight or dattention_bias)
    from_scores = attends and dbranches is not None and not gated
    from_products = attends and not gated and not from_scores
    scaled = dy is not None and dbranches is None and not gated
    n2, way = tiles.power_of_two(n), products_on(weight.device)
    scores_tile, scores_run = tiles.head_product("head_scores", classes, width, dtype_name(weight.dtype), mode == MODES["gated"])
    image_tiles, scores_tiles = -(-batch // scores_tile[0]), -(-batch // scores_tile[0]) * -(-classes // scores_tile[1])
    tile, run = tiles.head_gradients(classes, width, dtype_name(weight.dtype), way == MULTIPLY_ADDS)
    columns, first, aligned = _columns(widths, tile[2])
    dy_strides, dz_strides = (0, 0) if dy is None else dy.strides, (0, 0, 0) if dbranches is None else dbranches.strides

    # Launches
    scores = gradients = last = sums = rows = None
    summed = image_tiles
    if gated or from_scores:
        scores = Launcher(kernels.head_scores, scores_tiles, (dy_strides, dz_strides, n, columns, classes, mode, *scores_tile, way == PARTS), *scores_run)
        if gated and attends:
            sums, summed = new.dense((scores_tiles, n * n + n), FP32), scores_tiles
        elif from_scores:
            sums = new.dense((image_tiles * (n + 1), classes), FP32)
    by_images = dweight or dbias or from_products
    if dpooled or by_images:
        rows = new.dense((first[-1] + 1, classes), FP32) if from_products else None
        over_images = first[-1] * -(-classes // tile[1]) if by_images else 0
        over_classes = first[-1] * -(-batch // tile[0]) if dpooled else 0
        needed = tuple(int(i in feature_stages) for i in range(n))
        fixed = (dy_strides, dz_strides, n, columns, first, needed, over_images, aligned, classes, mode, scaled, n2, *tile, way == PARTS)
        gradients = Launcher(kernels.head_gradients, over_images + over_classes, fixed, *run)
    if gated and attends:
        cols = min(32, tiles.power_of_two(n * n + n))
        last = Launcher(kernels.head_gate, -(-(n * n + n) // cols), (n, 64, cols), tiles.WARPS)
    elif attends:
        programs = -(-classes // 128) if attention in ("classwise", "folded") else 1
        last = Launcher(kernels.head_attention, programs, (n, first if from_products else None, classes, mode, n2, 128), tiles.WARPS)
    zeros = () if attends else tuple(i for i in (3, 4) if given[i])
    of_gates = new.dense((batch, n, classes), FP32) if gated else None
    return _Plan(results, given, zeros, scores, of_gates, sums, gradients, rows, last, summed)


def _new(allocation: Allocation | None) -> Tensor | None:
    return None if allocation is None else allocation()


def interflow_head_backward(
    dy: Tensor | None,
    dbranches: Tensor | None,
    pooled: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    widths: Sequence[int],
    feature_stages: Sequence[int],
    need_weight: bool,
    need_bias: bool,
    need_attention: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> dpooled [B, D] fp32 (zero in stages not asked for), dweight [K, D], dbias [n, K], dattention_weight, dattention_bias; [0] where not needed."""
    parameters = (weight, bias, attention_weight, attention_bias)
    upstream, needs = (described(dy), described(dbranches)), (need_weight, need_bias, need_attention)
    fields = tuple(map(described, parameters))
    plan = _plan(upstream, described(pooled), fields, attention, tuple(widths), tuple(feature_stages), needs, fill_is_on())
    guard = elsewhere(weight)
    if guard is not None:
        with guard:
            return interflow_head_backward(dy, dbranches, pooled, *parameters, attention, widths, feature_stages, *needs)

    results = tuple(new() for new in plan.results)
    for i in plan.zeros:
        results[i].zero_()
    dpooled, dweight, dbias, dattention_weight, dattention_bias = (t if there else None for t, there in zip(results, plan.given, strict=True))
    given, pooled = tuple(map(contiguous, parameters)), pooled.contiguous()
    batch = pooled.shape[0]
    dscores, sums, rows = _new(plan.of_gates), _new(plan.sums), _new(plan.rows)
    if plan.scores is not None:
        darguments, shares = _new(plan.of_gates), _new(plan.of_gates)
        plan.scores(dy, dbranches, pooled, *given, dscores, darguments, shares, sums, batch)
    if plan.gradients is not None:
        plan.gradients(dy, dbranches, dscores, pooled, *given[:3], dpooled, dweight, dbias, rows, batch)
    if plan.attention is not None:
        plan.attention(sums if rows is None else rows, dattention_weight, dattention_bias, plan.summed)
    return results
