"""interflow_head in Triton, the host side: check, plan, allocate, launch, return. Arguments and results are the raw operator's.

Two launches: one pools every map, one multiplies and aggregates; the first falls away where up to four features are all pooled
already, as a StageTap gives them. What depends on shapes only is planned once and kept.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import interflow_head_kernels as kernels
from . import tiles
from ._checks import check_dtype, fail
from ._launch import PARTS, launch, on_device, products_on

MAX_STAGES = 16
MODES = {"hard": 0, "1xn": 0, "nxn": 1, "classwise": 2, "gated": 3, "folded": 4}


def check_parameters(
    operator: str, weight: Tensor, bias: Tensor | None, attention_weight: Tensor | None, attention_bias: Tensor | None, attention: str, n: int, width: int
) -> None:
    """Shapes, dtypes and devices of the head's parameters, as the compiled operators ask for them."""
    if attention not in MODES:
        fail(f"{operator}: attention must be one of hard, 1xn, nxn, classwise, gated, folded, got {attention!r}")
    if not (weight.dim() == 2 and weight.shape[0] > 0):
        fail(f"{operator}: weight must be [K, D] with K of at least 1, got {list(weight.shape)}")
    if weight.shape[1] != width:
        fail(f"{operator}: weight must have D = {width} columns, the sum of the features' pooled values, got {list(weight.shape)}")
    k = weight.shape[0]
    shapes: dict[str, list[int] | None] = {
        "bias": [n, k],
        "attention_weight": {"nxn": [n, n], "gated": [n, n], "classwise": [n, k], "folded": None}.get(attention, [n]),
        "attention_bias": {"hard": None, "1xn": [1], "nxn": [n], "gated": [n]}.get(attention, [k]),
    }
    if (attention_weight is None) is not (attention == "folded"):
        fail(f"{operator}: attention_weight must be a tensor for every attention but 'folded', got {attention!r}")
    if attention_bias is None and attention == "gated":
        fail(f"{operator}: attention_bias must be a tensor for attention 'gated'")
    for name, t in (("weight", weight), ("bias", bias), ("attention_weight", attention_weight), ("attention_bias", attention_bias)):
        if t is None:
            continue
        check_dtype(operator, name, t)
        if t.device != weight.device:
            fail(f"{operator}: {name} must be on the device of weight, {weight.device}, got {t.device}")
        if name != "weight" and list(t.shape) != shapes[name]:
            fail(f"{operator}: {name} must be {shapes[name]} for attention {attention!r}, got {list(t.shape)}")


def dtype_name(t: Tensor) -> str:
    return str(t.dtype).removeprefix("torch.")


def dense(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()


@tiles.cached
def _pool_plan(shapes: tuple[tuple[int, ...], ...], strides: tuple[tuple[int, ...], ...], elements: tuple[int, ...], bins: tuple[int, int]) -> Any:
    """What follows from the features' shapes: constants of both kernels, units of an image, columns of partial, warps and stages of the pool."""
    stages: list[int] = []
    first, columns, parts, pixels, partial_columns = [0], [0], [], [], []
    partial_d = 0
    runs = []
    for shape, stride, element in zip(shapes, strides, elements, strict=True):
        channels, (height, width) = shape[1], shape[2:] or (1, 1)
        sb, sc, sh, sw = stride if len(shape) == 4 else (*stride, 1, 1)
        several = len(shape) == 4 and bins != (1, 1)
        count = bins[0] * bins[1] if len(shape) == 4 else 1
        if width == 1 and height > 1:  # one row
            height, width, sh, sw = (1, height, 1, sh) if not several else (height, width, sh, sw)
        window = (height // bins[0] + 2) * (width // bins[1] + 2) if several else None
        part, run = tiles.head_pool(channels, height, width, element, sc == 1 and channels > 1, None if window is None else min(window, height * width))
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
    return tuple(stages), tuple(first), tuple(columns), tuple(parts), tuple(pixels), tuple(partial_columns), partial_d, run


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
    # Check
    name = "interflow_head"
    n = len(features)
    if not (1 <= n <= MAX_STAGES):
        fail(f"{name}: features must name 1 to {MAX_STAGES} stages, got {n}")
    if not (len(pool_size) == 2 and min(pool_size) > 0):
        fail(f"{name}: pool_size must be two numbers of at least 1, got {list(pool_size)}")
    batch = features[0].shape[0] if features[0].dim() else 0
    for i, x in enumerate(features):
        if x.dim() not in (2, 4):
            fail(f"{name}: features[{i}] must be [B, C, H, W] or, already pooled, [B, D_i], got {list(x.shape)}")
        if not (x.dim() == 2 or min(x.shape[2:]) > 0):
            fail(f"{name}: features[{i}] must have H and W of at least 1, got {list(x.shape)}")
        if x.shape[0] != batch:
            fail(f"{name}: features[{i}] must have the batch of features[0], {batch}, got {list(x.shape)}")
        if x.device != weight.device:
            fail(f"{name}: features[{i}] must be on the device of weight, {weight.device}, got {x.device}")
        check_dtype(name, f"features[{i}]", x)
    bins = (pool_size[0], pool_size[1])
    plan = _pool_plan(tuple((0, *x.shape[1:]) for x in features), tuple(x.stride() for x in features), tuple(x.element_size() for x in features), bins)
    stages, first, columns, parts, pixels, partial_columns, partial_d, pool_run = plan
    width = columns[-1]
    check_parameters(name, weight, bias, attention_weight, attention_bias, attention, n, width)

    # Allocate
    classes = weight.shape[0]
    dtype = weight.dtype if dtype is None else dtype
    y = weight.new_empty((batch, classes), dtype=dtype)
    branches = weight.new_empty((batch, n, classes) if need_branches else (0,), dtype=dtype)
    pooled = weight.new_empty((batch, width), dtype=torch.float32)
    if batch == 0:
        return y, branches, pooled
    direct = n <= 4 and all(x.dim() == 2 for x in features)
    partial = weight.new_empty((batch, partial_d), dtype=torch.float32) if partial_d else None
    parameters = [dense(t) for t in (weight, bias, attention_weight, attention_bias)]

    # Launch
    with on_device(weight):
        if not direct:
            arguments = (*features, *(None,) * (MAX_STAGES - n), pooled, partial)
            launch(kernels.head_pool, batch * first[-1], arguments, (n, stages, first, width, partial_d), *pool_run)
        tile, run = tiles.head_product("head_tail", classes, width, dtype_name(weight), attention == "gated")
        sources = (*features, *(None,) * (4 - n)) if direct else (None,) * 4
        strides = tuple(s for x in features for s in x.stride()) if direct else ()
        tables = (columns, parts, pixels, partial_columns, partial_d)
        constants = (n, direct, strides, *tables, classes, MODES[attention], tiles.power_of_two(n), *tile, products_on(weight.device) == PARTS)
        programs = -(-batch // tile[0]) * -(-classes // tile[1])
        launch(
            kernels.head_tail,
            programs,
            (*sources, pooled, partial, *parameters, y, branches if need_branches else None, batch),
            constants,
            *run,
        )
    return y, branches, pooled
