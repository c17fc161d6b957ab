"""stage_tap_backward in Triton, the host side. One launch, and a small one that sums d(shift) where it is asked for.

A plan is what follows from shapes, strides, dtypes, device and what is asked for, checks included; it is made once and kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._tap_format import mask_bytes
from .. import tiles
from ..common.checks import Description, check_dtype, described, description, fail
from ..common.launch import Launcher, elsewhere
from ..common.maps import sum_rows
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.offsets import is_wide
from . import nchw_kernels as planes
from . import nhwc_kernels as pixels


class _Plan(NamedTuple):
    du: Allocation
    dshift: Allocation
    launch: Launcher | None = None  # None: nothing to do
    sums: Allocation | None = None  # rows that dshift is the sum of
    rows: int = 0
    sum_rows: Launcher | None = None


@tiles.cached
def _plan(
    dm_fields: Any,
    dp_fields: Any,
    mask_fields: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    max_pool: bool,
    channels_last: bool,
    need_shift: bool,
    fill: bool,
) -> _Plan:
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
        return _Plan(du, dshift)
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
    launcher = Launcher(kernel, programs, (channels, height, width, *dm_strides, *dp_strides, max_pool, *tile, is_wide(shape, dm_strides)), *run)
    if not need_shift:
        return _Plan(du, dshift, launcher)
    cols = min(32, tiles.power_of_two(channels))
    summing = Launcher(sum_rows, -(-channels // cols), (channels, 32, cols), tiles.WARPS)
    return _Plan(du, dshift, launcher, new.dense((batch * parts, channels), torch.float32), batch * parts, summing)


def stage_tap_backward(
    dm: Tensor | None, dp: Tensor | None, mask: Tensor, like: Tensor, max_pool: bool, channels_last: bool, need_shift: bool
) -> tuple[Tensor, Tensor]:
    """dm [B, C, H/2, W/2], dp [B, C], any strides, each may be missing -> du [B, C, H, W], dshift [C] fp32 or [0]."""
    if not max_pool:
        dm = None
    plan = _plan(described(dm), described(dp), described(mask), like.shape, like.dtype, max_pool, channels_last, need_shift, fill_is_on())
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
