"""stage_tap in Triton, the host side: plan, allocate, launch, return. Arguments and results are the raw operator's.

One launch: in NCHW a program sums whole planes, in NHWC a whole channel block of an image or, where that is large, parts of it, the
last of which to arrive adds them in order. A plan is what follows from shapes, strides, dtypes and device, checks included; it is
made once and kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._tap_format import mask_bytes, runs_along_channels
from .. import tiles
from ..common.checks import Description, check_map, contiguous, described, description
from ..common.launch import Launcher, counters, elsewhere
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.offsets import is_wide
from . import nchw_kernels as planes
from . import nhwc_kernels as pixels


class _Plan(NamedTuple):
    m: Allocation
    p: Allocation
    mask: Allocation
    launch: Launcher | None = None  # None: nothing to do
    without: tuple[None, ...] = ()  # what stands for partial and counters where there are none
    partial: Allocation | None = None  # where parts of a map meet
    counters: int = 0  # then


@tiles.cached
def _plan(u_fields: Any, shift_fields: Any, max_pool: bool, need_mask: bool, fill: bool) -> _Plan:
    # Check
    u, shift = Description(*u_fields), description(shift_fields)
    check_map("stage_tap", u, shift)
    batch, channels, height, width = u.shape

    # Sizes
    channels_last = runs_along_channels(u.shape, u.strides)
    new = Memory(u.device, fill)
    m = new.map((batch, channels, height // 2, width // 2), u.dtype, channels_last) if max_pool else new.nothing(u.dtype)
    p = new.dense((batch, channels), torch.float32)
    mask = new.dense((mask_bytes(u.shape, max_pool, channels_last) if need_mask else 0,), torch.uint8)
    if batch == 0 or channels == 0:
        return _Plan(m, p, mask)
    sizes, wide = (channels, height, width, *u.strides, max_pool), is_wide(u.shape, u.strides)
    if not channels_last:
        (rows, cols), run = tiles.tap_planes("tap_planes", channels, height, width, u.dtype.itemsize, max_pool)
        return _Plan(m, p, mask, Launcher(planes.tap_planes, batch * -(-channels // rows), (*sizes, rows, cols, wide), *run))
    tile, run = tiles.tap_pixels("tap_pixels", channels, height, width, u.dtype.itemsize, max_pool)
    parts, blocks = tile[0], -(-channels // tile[3])
    partial = new.dense((batch, parts, channels), torch.float32) if parts > 1 else None
    launcher = Launcher(pixels.tap_pixels, batch * parts * blocks, (*sizes, *tile, wide), *run)
    return _Plan(m, p, mask, launcher, (None, None), partial, batch * blocks)


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool, need_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, C, H, W], shift [C] -> m [B, C, H/2, W/2] or [0], p [B, C] fp32, mask [bytes] or [0]."""
    plan = _plan(described(u), described(shift), max_pool, need_mask, fill_is_on())
    guard = elsewhere(u)
    if guard is not None:
        with guard:
            return stage_tap(u, shift, max_pool, need_mask)
    m, p, mask = plan.m(), plan.p(), plan.mask()
    if plan.launch is not None:
        meeting = plan.without if plan.partial is None else (plan.partial(), counters(u, plan.counters))
        plan.launch(u, contiguous(shift), m if max_pool else None, p, mask if need_mask else None, *meeting)
    return m, p, mask
