"""How the head's features are pooled in Triton, and interflow_pool's host side: plan, allocate, launch, return.

One launch: a map too large for one program is pooled in parts, the last of which to arrive adds them in order. The head itself leaves
that to its second launch (forward.py); the bits are the same.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tiles
from ..common.checks import Description, check_dtype, described, fail
from ..common.launch import Launcher, counters, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from . import pool_kernels as kernels
from .parameters import MAX_STAGES


class Pooling(NamedTuple):
    """How the features are pooled: tables with an entry for each stage, constants of the kernels."""

    stages: tuple[int, ...]  # STAGE_FIELDS numbers each
    first: tuple[int, ...]  # units of an image before each stage, and of all
    columns: tuple[int, ...]  # of pooled, before each stage, and of all
    parts: tuple[int, ...]
    pixels: tuple[int, ...]
    partial_columns: tuple[int, ...]
    partial_d: int
    run: tuple[int, int]  # warps, stages


def pooling_of(features: Sequence[Description], bins: tuple[int, int]) -> Pooling:
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
    return Pooling(tuple(stages), tuple(first), tuple(columns), tuple(parts), tuple(pixels), tuple(partial_columns), partial_d, run)


def check_features(name: str, features: Sequence[Description], bins: Sequence[int], device: torch.device, where: str) -> int:
    """Stages, pool_size, and of each feature rank, extent, batch, device (that of the argument `where`) and dtype; returns the batch."""
    if not (1 <= len(features) <= MAX_STAGES):
        fail(f"{name}: features must name 1 to {MAX_STAGES} stages, got {len(features)}")
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
        if x.device != device:
            fail(f"{name}: features[{i}] must be on the device of {where}, {device}, got {x.device}")
        check_dtype(name, f"features[{i}]", x.dtype)
    return batch


class _Plan(NamedTuple):
    pooled: Allocation
    launch: Launcher | None = None  # None: nothing to do
    partial: Allocation | None = None  # sums of parts of maps
    counters: int = 0  # then
    without: tuple[None, ...] = ()  # what stands in the launch's arguments for features that are not there


@tiles.cached
def _plan(features_fields: Any, bins: tuple[int, ...], fill: bool) -> _Plan:
    features = [Description(*x) for x in features_fields]
    device = features[0].device if features else torch.device("cpu")
    batch = check_features("interflow_pool", features, bins, device, "features[0]")
    pooling, n = pooling_of(features, (bins[0], bins[1])), len(features)
    new = Memory(device, fill)
    pooled = new.dense((batch, pooling.columns[-1]), torch.float32)
    if batch == 0 or pooling.columns[-1] == 0:
        return _Plan(pooled)
    partial = new.dense((batch, pooling.partial_d), torch.float32) if pooling.partial_d else None
    constants = (n, pooling.stages, pooling.first, pooling.columns[-1], pooling.partial_d)
    launcher = Launcher(kernels.head_pool_whole, batch * pooling.first[-1], constants, *pooling.run)
    return _Plan(pooled, launcher, partial, batch * pooling.first[-1], (None,) * (MAX_STAGES - n))


def interflow_pool(features: Sequence[Tensor], pool_size: Sequence[int]) -> Tensor:
    """features n of [B, C_i, H_i, W_i] or [B, D_i] -> pooled [B, D] fp32."""
    plan = _plan(tuple(map(described, features)), tuple(pool_size), fill_is_on())
    guard = elsewhere(features[0])
    if guard is not None:
        with guard:
            return interflow_pool(features, pool_size)
    pooled = plan.pooled()
    if plan.launch is not None:
        meeting = (None, None) if plan.partial is None else (plan.partial(), counters(features[0], plan.counters))
        plan.launch(*features, *plan.without, pooled, *meeting)
    return pooled
