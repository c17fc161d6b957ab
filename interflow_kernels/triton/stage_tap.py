"""stage_tap in Triton, the host side: plan, allocate, launch, return. Arguments and results are the raw operator's.

Forward is one launch: in NCHW a program sums whole planes, in NHWC a whole channel block of an image or, where that is large,
parts of it, the last of which to arrive adds them in order. Backward is one launch, and a small one that sums d(shift). A plan is
what follows from shapes, strides, dtypes and device, checks included; it is made once and kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._tap_format import mask_bytes, runs_along_channels
from . import stage_tap_pixels_kernels as pixels
from . import stage_tap_planes_kernels as planes
from . import tiles
from ._checks import Description, check_dtype, contiguous, described, description, fail
from ._launch import Launcher, counters, elsewhere
from ._memory import Allocation, Memory, fill_is_on
from .stage_tap_kernels import sum_rows


def _is_wide(shape: tuple[int, ...], *strides: tuple[int, ...]) -> bool:
    """Whether an offset inside an image may leave 31 bits; the mask and the dense maps count with C * H * W, a tile's overhang with twice."""
    _, channels, height, width = shape
    spans = [(channels + 64) * s[1] + (height + 2) * s[2] + (width + 2) * s[3] for s in strides]
    return max(2 * (channels + 64) * (height + 2) * (width + 2), 2 * max(spans)) >= 2**31


# --- forward --------------------------------------------------------------------------------------------------------------
class _Forward(NamedTuple):
    m: Allocation
    p: Allocation
    mask: Allocation
    launch: Launcher | None = None  # None: nothing to do
    without: tuple[None, ...] = ()  # what stands for partial and counters where there are none
    partial: Allocation | None = None  # where parts of a map meet
    counters: int = 0  # then


@tiles.cached
def _forward_plan(u_fields: Any, shift_fields: Any, max_pool: bool, need_mask: bool, fill: bool) -> _Forward:
    # Check
    u, shift = Description(*u_fields), description(shift_fields)
    if not (len(u.shape) == 4 and min(u.shape[2:]) > 0):
        fail(f"stage_tap: u must be [B, C, H, W] with H and W of at least 1, got {list(u.shape)}")
    check_dtype("stage_tap", "u", u.dtype)
    batch, channels, height, width = u.shape
    if shift is not None:
        if list(shift.shape) != [channels]:
            fail(f"stage_tap: shift must be [{channels}], got {list(shift.shape)}")
        if shift.dtype not in (u.dtype, torch.float32):
            fail(f"stage_tap: shift must have the dtype of u, {u.dtype}, or be fp32, got {shift.dtype}")
        if shift.device != u.device:
            fail(f"stage_tap: shift must be on the device of u, {u.device}, got {shift.device}")

    # Sizes
    channels_last = runs_along_channels(u.shape, u.strides)
    new = Memory(u.device, fill)
    m = new.map((batch, channels, height // 2, width // 2), u.dtype, channels_last) if max_pool else new.nothing(u.dtype)
    p = new.dense((batch, channels), torch.float32)
    mask = new.dense((mask_bytes(u.shape, max_pool, channels_last) if need_mask else 0,), torch.uint8)
    if batch == 0 or channels == 0:
        return _Forward(m, p, mask)
    sizes, wide = (channels, height, width, *u.strides, max_pool), _is_wide(u.shape, u.strides)
    if not channels_last:
        (rows, cols), run = tiles.tap_planes("tap_planes", channels, height, width, u.dtype.itemsize, max_pool)
        return _Forward(m, p, mask, Launcher(planes.tap_planes, batch * -(-channels // rows), (*sizes, rows, cols, wide), *run))
    tile, run = tiles.tap_pixels("tap_pixels", channels, height, width, u.dtype.itemsize, max_pool)
    parts, blocks = tile[0], -(-channels // tile[3])
    partial = new.dense((batch, parts, channels), torch.float32) if parts > 1 else None
    launcher = Launcher(pixels.tap_pixels, batch * parts * blocks, (*sizes, *tile, wide), *run)
    return _Forward(m, p, mask, launcher, (None, None), partial, batch * blocks)


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool, need_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, C, H, W], shift [C] -> m [B, C, H/2, W/2] or [0], p [B, C] fp32, mask [bytes] or [0]."""
    plan = _forward_plan(described(u), described(shift), max_pool, need_mask, fill_is_on())
    guard = elsewhere(u)
    if guard is not None:
        with guard:
            return stage_tap(u, shift, max_pool, need_mask)
    m, p, mask = plan.m(), plan.p(), plan.mask()
    if plan.launch is not None:
        meeting = plan.without if plan.partial is None else (plan.partial(), counters(u, plan.counters))
        plan.launch(u, contiguous(shift), m if max_pool else None, p, mask if need_mask else None, *meeting)
    return m, p, mask


# --- backward -------------------------------------------------------------------------------------------------------------
class _Backward(NamedTuple):
    du: Allocation
    dshift: Allocation
    launch: Launcher | None = None  # None: nothing to do
    sums: Allocation | None = None  # rows that dshift is the sum of
    rows: int = 0
    sum_rows: Launcher | None = None


@tiles.cached
def _backward_plan(
    dm_fields: Any,
    dp_fields: Any,
    mask_fields: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    max_pool: bool,
    channels_last: bool,
    need_shift: bool,
    fill: bool,
) -> _Backward:
    # Check
    name = "stage_tap_backward"
    dm, dp, mask = description(dm_fields), description(dp_fields), Description(*mask_fields)
    if not (len(shape) == 4 and min(shape[2:]) > 0):
        fail(f"{name}: like must be of u's shape [B, C, H, W], got {list(shape)}")
    check_dtype(name, "u", dtype)
    batch, channels, height, width = shape
    size = mask_bytes(shape, max_pool, channels_last)
    if not (mask.dtype == torch.uint8 and list(mask.shape) == [size] and (size < 2 or mask.strides == (1,))):
        fail(f"{name}: mask must be {size} contiguous bytes as stage_tap returned it, got {list(mask.shape)} of {mask.dtype}")
    if dm is not None:
        expected = [batch, channels, height // 2, width // 2]
        if not (list(dm.shape) == expected and dm.dtype == dtype):
            fail(f"{name}: dm must be {expected} in u's dtype, got {list(dm.shape)} in {dm.dtype}")
        if dm.device != mask.device:
            fail(f"{name}: dm must be on the device of mask, {mask.device}, got {dm.device}")
    if dp is not None:
        if not (list(dp.shape) == [batch, channels] and dp.dtype == torch.float32):
            fail(f"{name}: dp must be [{batch}, {channels}] in fp32, got {list(dp.shape)} in {dp.dtype}")
        if dp.device != mask.device:
            fail(f"{name}: dp must be on the device of mask, {mask.device}, got {dp.device}")

    # Sizes
    new = Memory(mask.device, fill)
    du, dshift = new.map(shape, dtype, channels_last), new.dense((channels if need_shift else 0,), torch.float32)
    if batch == 0 or channels == 0:
        return _Backward(du, dshift)
    if channels_last:
        kernel: Any = pixels.tap_pixels_backward
        tile, run = tiles.tap_pixels("tap_pixels_backward", channels, height, width, dtype.itemsize, max_pool)
        parts = tile[0]
        programs = batch * parts * -(-channels // tile[3])
    else:
        kernel, parts = planes.tap_planes_backward, 1
        tile, run = tiles.tap_planes("tap_planes_backward", channels, height, width, dtype.itemsize, max_pool)
        programs = batch * -(-channels // tile[0])
    dm_strides = (0, 0, 0, 0) if dm is None else dm.strides
    dp_strides = (0, 0) if dp is None else dp.strides
    launcher = Launcher(kernel, programs, (channels, height, width, *dm_strides, *dp_strides, max_pool, *tile, _is_wide(shape, dm_strides)), *run)
    if not need_shift:
        return _Backward(du, dshift, launcher)
    cols = min(32, tiles.power_of_two(channels))
    summing = Launcher(sum_rows, -(-channels // cols), (channels, 32, cols), tiles.WARPS)
    return _Backward(du, dshift, launcher, new.dense((batch * parts, channels), torch.float32), batch * parts, summing)


def stage_tap_backward(
    dm: Tensor | None, dp: Tensor | None, mask: Tensor, like: Tensor, max_pool: bool, channels_last: bool, need_shift: bool
) -> tuple[Tensor, Tensor]:
    """dm [B, C, H/2, W/2], dp [B, C], any strides, each may be missing -> du [B, C, H, W], dshift [C] fp32 or [0]."""
    if not max_pool:
        dm = None
    plan = _backward_plan(described(dm), described(dp), described(mask), like.shape, like.dtype, max_pool, channels_last, need_shift, fill_is_on())
    guard = elsewhere(mask)
    if guard is not None:
        with guard:
            return stage_tap_backward(dm, dp, mask, like, max_pool, channels_last, need_shift)
    du, dshift = plan.du(), plan.dshift()
    if plan.launch is None:
        return du, dshift.zero_()
    sums = None if plan.sums is None else plan.sums()
    plan.launch(dm, dp, mask, du, sums)
    if plan.sum_rows is not None:
        plan.sum_rows(sums, dshift, plan.rows)
    return du, dshift
