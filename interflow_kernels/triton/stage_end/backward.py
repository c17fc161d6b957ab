"""stage_end_backward in Triton, the host side. One launch, and a small one that sums d(shift) where it is asked for.

A plan is what follows from shapes, strides, dtypes, device and what is asked for, checks included; it is made once and kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import tiles
from ..common.checks import check_dtype, check_same, described, description, fail
from ..common.launch import Launcher, elsewhere
from ..common.maps import sum_rows
from ..common.memory import Allocation, Memory, fill_is_on
from ..common.offsets import is_wide
from . import nchw_kernels as planes
from . import nhwc_kernels as pixels

NAME = "stage_end_backward"


class _Plan(NamedTuple):
    du: Allocation
    dshift: Allocation
    launch: Launcher | None = None  # None: nothing to do
    sums: Allocation | None = None  # rows that dshift is the sum of
    rows: int = 0
    sum_rows: Launcher | None = None


@tiles.cached
def _plan(
    dv_fields: Any,
    dp_fields: Any,
    v_fields: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
    need_shift: bool,
    fill: bool,
) -> _Plan:
    # Check
    dv, dp, v = description(dv_fields), description(dp_fields), description(v_fields)
    if not (len(shape) == 4 and min(shape[2:]) > 0):
        fail(f"{NAME}: like must be of u's shape [B, C, H, W], got {list(shape)}")
    check_dtype(NAME, "u", dtype)
    batch, channels, height, width = shape
    for name, t in (("dv", dv), ("v", v)):
        if t is not None:
            check_same(NAME, name, t, shape, dtype, device)
    if dp is not None:
        check_same(NAME, "dp", dp, (batch, channels), torch.float32, device)

    # Sizes
    new = Memory(device, fill)
    du, dshift = new.map(shape, dtype, channels_last), new.dense((channels if need_shift else 0,), torch.float32)
    if batch == 0 or channels == 0 or (dv is None and dp is None):
        return _Plan(du, dshift)
    if channels_last:
        kernel: Any = pixels.end_pixels_backward
        tile, run = tiles.end_pixels("end_pixels_backward", channels, height, width, dtype.itemsize)
        parts = tile[0]
        programs = batch * parts * -(-channels // tile[3])
    else:
        kernel, parts = planes.end_planes_backward, 1
        tile, run = tiles.end_planes("end_planes_backward", channels, height, width, dtype.itemsize)
        programs = batch * -(-channels // tile[0])
    strides = [(0, 0, 0, 0) if t is None else t.strides for t in (dv, v)]
    dp_strides = (0, 0) if dp is None else dp.strides
    constants = (channels, height, width, *strides[0], *strides[1], *dp_strides, *tile, is_wide(shape, *strides))
    launcher = Launcher(kernel, programs, constants, *run)
    if not need_shift:
        return _Plan(du, dshift, launcher)
    cols = min(32, tiles.power_of_two(channels))
    summing = Launcher(sum_rows, -(-channels // cols), (channels, 32, cols), tiles.WARPS)
    return _Plan(du, dshift, launcher, new.dense((batch * parts, channels), torch.float32), batch * parts, summing)


def stage_end_backward(dv: Tensor | None, dp: Tensor | None, v: Tensor | None, like: Tensor, channels_last: bool, need_shift: bool) -> tuple[Tensor, Tensor]:
    """dv, v [B, C, H, W], dp [B, C], any strides, each may be missing -> du [B, C, H, W], dshift [C] fp32 or [0]."""
    plan = _plan(described(dv), described(dp), described(v), like.shape, like.dtype, like.device, channels_last, need_shift, fill_is_on())
    guard = elsewhere(like)
    if guard is not None:
        with guard:
            return stage_end_backward(dv, dp, v, like, channels_last, need_shift)
    du, dshift = plan.du(), plan.dshift()
    if plan.launch is None:
        return du.zero_(), dshift.zero_()
    sums = None if plan.sums is None else plan.sums()
    plan.launch(dv, dp, v, du, sums)
    if plan.sum_rows is not None:
        plan.sum_rows(sums, dshift, plan.rows)
    return du, dshift
