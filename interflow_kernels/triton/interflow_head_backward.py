"""interflow_head_backward in Triton, the host side. At most three launches, fewer where less is asked for:

1. where Z is needed (gated, or the branches have a gradient of their own beside the attention's): dscores and sums for the attention;
2. dpooled, dweight, dbias side by side; 3. the attention's gradients from rows of sums.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import interflow_head_backward_kernels as kernels
from . import tiles
from ._checks import fail
from ._launch import MULTIPLY_ADDS, PARTS, launch, on_device, products_on
from .interflow_head import MAX_STAGES, MODES, check_parameters, dense, dtype_name


@functools.lru_cache(maxsize=1024)
def _columns(widths: tuple[int, ...], wide: int) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Columns and tiles of `wide` columns before each stage, and the power of two that divides every stage's first column."""
    columns, first = [0], [0]
    for width in widths:
        columns.append(columns[-1] + width)
        first.append(first[-1] + max(1, -(-width // wide)))
    return tuple(columns), tuple(first), math.gcd(wide, *columns[:-1])


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
    # Check
    name = "interflow_head_backward"
    n = len(widths)
    if not (1 <= n <= MAX_STAGES):
        fail(f"{name}: widths must name 1 to {MAX_STAGES} stages, got {n}")
    if not (min(widths) >= 0):
        fail(f"{name}: widths must be at least 0, got {list(widths)}")
    width = sum(widths)
    check_parameters(name, weight, bias, attention_weight, attention_bias, attention, n, width)
    fits = pooled.dim() == 2 and pooled.shape[1] == width and pooled.dtype == torch.float32
    if not (fits):
        fail(f"{name}: pooled must be [B, {width}] in fp32 as interflow_head returned it, got {list(pooled.shape)} in {pooled.dtype}")
    batch, classes = pooled.shape[0], weight.shape[0]
    for argument, t, shape in (("dy", dy, [batch, classes]), ("dbranches", dbranches, [batch, n, classes])):
        if not (t is None or list(t.shape) == shape):
            fail(f"{name}: {argument} must be {shape}, got {None if t is None else list(t.shape)}")
    if not (all(0 <= i < n for i in feature_stages)):
        fail(f"{name}: feature_stages must be of 0 to {n - 1}, got {list(feature_stages)}")

    # Allocate
    def output(like: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        if like is None or not needed:
            return weight.new_empty((0,), dtype=dtype if like is None else like.dtype)
        return weight.new_empty(like.shape, dtype=like.dtype)

    results = (
        output(pooled, len(feature_stages) > 0, torch.float32),
        output(weight, need_weight, torch.float32),
        output(bias, need_bias, torch.float32),
        output(attention_weight, need_attention, torch.float32),
        output(attention_bias, need_attention, torch.float32),
    )
    if batch == 0 or (dy is None and dbranches is None):
        for t in results:
            t.zero_()
        return results
    dpooled, dweight, dbias, dattention_weight, dattention_bias = (t if t.numel() else None for t in results)
    weight, bias, attention_weight, attention_bias = (dense(t) for t in (weight, bias, attention_weight, attention_bias))  # type: ignore[assignment]
    pooled = pooled.contiguous()
    fp32 = functools.partial(weight.new_empty, dtype=torch.float32)

    # Sizes
    mode = MODES[attention]
    gated = mode == MODES["gated"] and dy is not None
    attends = dy is not None and (dattention_weight is not None or dattention_bias is not None)
    from_scores = attends and dbranches is not None and not gated
    from_products = attends and not gated and not from_scores
    scaled = dy is not None and dbranches is None and not gated
    n2, way = tiles.power_of_two(n), products_on(weight.device)
    scores_tile, scores_run = tiles.head_product("head_scores", classes, width, dtype_name(weight), mode == MODES["gated"])
    image_tiles, scores_tiles = -(-batch // scores_tile[0]), -(-batch // scores_tile[0]) * -(-classes // scores_tile[1])
    tile, run = tiles.head_gradients(classes, width, dtype_name(weight), way == MULTIPLY_ADDS)
    columns, first, aligned = _columns(tuple(widths), tile[2])
    dy_strides = (0, 0) if dy is None else dy.stride()
    dz_strides = (0, 0, 0) if dbranches is None else dbranches.stride()

    # Launch
    with on_device(weight):
        dscores = sums = None
        if gated or from_scores:
            darguments = shares = None
            if gated:
                dscores, darguments, shares = (fp32((batch, n, classes)) for _ in range(3))
                sums = fp32((scores_tiles, n * n + n)) if attends else None
            elif from_scores:
                sums = fp32((image_tiles * (n + 1), classes))
            given: tuple[Any, ...] = (dy, dbranches, pooled, weight, bias, attention_weight, attention_bias, dscores, darguments, shares, sums, batch)
            constants = (dy_strides, dz_strides, n, columns, classes, mode, *scores_tile, way == PARTS)
            launch(kernels.head_scores, scores_tiles, given, constants, *scores_run)

        by_images = dweight is not None or dbias is not None or from_products
        if dpooled is not None or by_images:
            rows = fp32((first[-1] + 1, classes)) if from_products else None
            over_images = first[-1] * -(-classes // tile[1]) if by_images else 0
            over_classes = first[-1] * -(-batch // tile[0]) if dpooled is not None else 0
            needed = tuple(int(i in feature_stages) for i in range(n))
            given = (dy, dbranches, dscores, pooled, weight, bias, attention_weight, dpooled, dweight, dbias, rows, batch)
            fixed = (dy_strides, dz_strides, n, columns, first, needed, over_images, aligned, classes, mode, scaled, n2, *tile, way == PARTS)
            launch(kernels.head_gradients, over_images + over_classes, given, fixed, *run)
            sums = rows if from_products else sums

        if gated and attends:
            assert sums is not None
            cols = min(32, tiles.power_of_two(n * n + n))
            launch(kernels.head_gate, -(-(n * n + n) // cols), (sums, dattention_weight, dattention_bias, sums.shape[0]), (n, 64, cols), tiles.WARPS)
        elif attends:
            per_class = attention in ("classwise", "folded")
            programs = -(-classes // 128) if per_class else 1
            tables = (n, first if from_products else None, classes, mode, n2, 128)
            launch(kernels.head_attention, programs, (sums, dattention_weight, dattention_bias, image_tiles), tables, tiles.WARPS)
        else:
            for t in results[3:]:
                if t.numel():
                    t.zero_()
    return results
