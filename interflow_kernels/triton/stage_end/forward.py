"""stage_end in Triton, the host side: plan, allocate, launch, return. Arguments and results are the raw operator's.

One launch: in NCHW a program sums whole planes, in NHWC a whole channel block of an image or, where that is large, parts of it, the
last of which to arrive adds them in order. A plan is what follows from shapes, strides, dtypes and device, checks included; it is
made once and kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._tap_format import runs_along_channels
from .. import tiles
from ..common.checks import Description, check_map, check_same, contiguous, described, description, fail
from ..common.launch import Launcher, counters, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.offsets import is_wide
from . import nchw_kernels as planes
from . import nhwc_kernels as pixels

NAME = "stage_end"


class _Plan(NamedTuple):
    v: Allocation
    p: Allocation
    launch: Launcher | None = None  # None: nothing to do
    meets: bool = False  # whether the kernel takes partial and counters
    partial: Allocation | None = None  # where parts of a map meet
    counters: int = 0  # then


@tiles.cached
def _plan(u_fields: Any, shift_fields: Any, residual_fields: Any, activation: str, fill: bool) -> _Plan:
    # Check
    u, shift, residual = Description(*u_fields), description(shift_fields), description(residual_fields)
    if activation not in ("relu", "none"):
        fail(f"{NAME}: activation must be 'relu' or 'none', got {activation!r}")
    check_map(NAME, u, shift)
    if residual is not None:
        check_same(NAME, "residual", residual, u.shape, u.dtype, u.device)

    # Sizes
    batch, channels, height, width = u.shape
    channels_last = runs_along_channels(u.shape, u.strides)
    new = Memory(u.device, fill)
    v, p = new.map(u.shape, u.dtype, channels_last), new.dense((batch, channels), torch.float32)
    if batch == 0 or channels == 0:
        return _Plan(v, p)
    of_residual = (0, 0, 0, 0) if residual is None else residual.strides
    sizes, wide = (channels, height, width, *u.strides, *of_residual, activation == "relu"), is_wide(u.shape, u.strides, of_residual)
    if not channels_last:
        (rows, cols), run = tiles.end_planes("end_planes", channels, height, width, u.dtype.itemsize)
        return _Plan(v, p, Launcher(planes.end_planes, batch * -(-channels // rows), (*sizes, rows, cols, wide), *run))
    tile, run = tiles.end_pixels("end_pixels", channels, height, width, u.dtype.itemsize)
    parts, blocks = tile[0], -(-channels // tile[3])
    partial = new.dense((batch, parts, channels), torch.float32) if parts > 1 else None
    return _Plan(v, p, Launcher(pixels.end_pixels, batch * parts * blocks, (*sizes, *tile, wide), *run), True, partial, batch * blocks)


def stage_end(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """u, residual [B, C, H, W], shift [C] -> v [B, C, H, W], p [B, C] fp32."""
    plan = _plan(described(u), described(shift), described(residual), activation, fill_is_on())
    guard = elsewhere(u)
    if guard is not None:
        with guard:
            return stage_end(u, shift, residual, activation)
    v, p = plan.v(), plan.p()
    if plan.launch is not None:
        meeting: tuple[Any, ...] = ()
        if plan.meets:
            meeting = (None, None) if plan.partial is None else (plan.partial(), counters(u, plan.counters))
        plan.launch(u, contiguous(shift), residual, v, p, *meeting)
    return v, p
