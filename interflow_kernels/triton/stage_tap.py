"""stage_tap in Triton, the host side: check, sizes, allocate, launch, return. Arguments and results are the raw operator's.

Forward is one launch: in NCHW a program sums whole planes, in NHWC a whole channel block of an image or, where that is large,
parts of it, the last of which to arrive adds them in order. Backward is one launch, and a small one that sums d(shift).
"""

import torch
from torch import Tensor

from .._tap_format import is_channels_last, mask_bytes, new_map
from . import stage_tap_pixels_kernels as pixels
from . import stage_tap_planes_kernels as planes
from . import tiles
from ._checks import check_dtype, fail
from ._launch import counters, launch, on_device
from .stage_tap_kernels import sum_rows


def _is_wide(shape: tuple[int, int, int, int], *strides: tuple[int, ...]) -> bool:
    """Whether an offset inside an image may leave 31 bits; the mask and the dense maps count with C * H * W, a tile's overhang with twice."""
    _, channels, height, width = shape
    spans = [(channels + 64) * s[1] + (height + 2) * s[2] + (width + 2) * s[3] for s in strides]
    return max(2 * (channels + 64) * (height + 2) * (width + 2), 2 * max(spans)) >= 2**31


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool, need_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """u [B, C, H, W], shift [C] -> m [B, C, H/2, W/2] or [0], p [B, C] fp32, mask [bytes] or [0]."""
    # Check
    if not (u.dim() == 4 and min(u.shape[2:]) > 0):
        fail(f"stage_tap: u must be [B, C, H, W] with H and W of at least 1, got {list(u.shape)}")
    check_dtype("stage_tap", "u", u)
    batch, channels, height, width = shape = (u.shape[0], u.shape[1], u.shape[2], u.shape[3])
    if shift is not None:
        if list(shift.shape) != [channels]:
            fail(f"stage_tap: shift must be [{channels}], got {list(shift.shape)}")
        if shift.dtype not in (u.dtype, torch.float32):
            fail(f"stage_tap: shift must have the dtype of u, {u.dtype}, or be fp32, got {shift.dtype}")
        if shift.device != u.device:
            fail(f"stage_tap: shift must be on the device of u, {u.device}, got {shift.device}")

    # Sizes
    channels_last = is_channels_last(u)
    strides = u.stride()
    wide = _is_wide(shape, strides)

    # Allocate
    m = new_map(u, (batch, channels, height // 2, width // 2), u.dtype, channels_last) if max_pool else u.new_empty((0,))
    p = u.new_empty((batch, channels), dtype=torch.float32)
    mask = u.new_empty((mask_bytes(shape, max_pool, channels_last) if need_mask else 0,), dtype=torch.uint8)
    if batch == 0 or channels == 0:
        return m, p, mask
    outputs = (m if max_pool else None, p, mask if need_mask else None)
    if shift is not None and not shift.is_contiguous():
        shift = shift.contiguous()

    # Launch
    with on_device(u):
        if channels_last:
            (parts, part, rows, cols), run = tiles.tap_pixels("tap_pixels", channels, height, width, u.element_size(), max_pool)
            blocks = -(-channels // cols)
            meeting = (None, None) if parts == 1 else (u.new_empty((batch, parts, channels), dtype=torch.float32), counters(u, batch * blocks))
            constants = (channels, height, width, *strides, max_pool, parts, part, rows, cols, wide)
            launch(pixels.tap_pixels, batch * parts * blocks, (u, shift, *outputs, *meeting), constants, *run)
        else:
            (rows, cols), run = tiles.tap_planes("tap_planes", channels, height, width, u.element_size(), max_pool)
            sizes = (channels, height, width, *strides, max_pool, rows, cols, wide)
            launch(planes.tap_planes, batch * -(-channels // rows), (u, shift, *outputs), sizes, *run)
    return m, p, mask


def stage_tap_backward(
    dm: Tensor | None, dp: Tensor | None, mask: Tensor, like: Tensor, max_pool: bool, channels_last: bool, need_shift: bool
) -> tuple[Tensor, Tensor]:
    """dm [B, C, H/2, W/2], dp [B, C], any strides, each may be missing -> du [B, C, H, W], dshift [C] fp32 or [0]."""
    # Check
    name = "stage_tap_backward"
    if not (like.dim() == 4 and min(like.shape[2:]) > 0):
        fail(f"{name}: like must be of u's shape [B, C, H, W], got {list(like.shape)}")
    check_dtype(name, "u", like)
    batch, channels, height, width = shape = (like.shape[0], like.shape[1], like.shape[2], like.shape[3])
    size = mask_bytes(shape, max_pool, channels_last)
    fits = mask.dtype == torch.uint8 and mask.is_contiguous() and list(mask.shape) == [size]
    if not (fits):
        fail(f"{name}: mask must be {size} contiguous bytes as stage_tap returned it, got {list(mask.shape)} of {mask.dtype}")
    if not max_pool:
        dm = None
    if dm is not None:
        expected = [batch, channels, height // 2, width // 2]
        if not (list(dm.shape) == expected and dm.dtype == like.dtype):
            fail(f"{name}: dm must be {expected} in u's dtype, got {list(dm.shape)} in {dm.dtype}")
        if dm.device != mask.device:
            fail(f"{name}: dm must be on the device of mask, {mask.device}, got {dm.device}")
    if dp is not None:
        if not (list(dp.shape) == [batch, channels] and dp.dtype == torch.float32):
            fail(f"{name}: dp must be [{batch}, {channels}] in fp32, got {list(dp.shape)} in {dp.dtype}")
        if dp.device != mask.device:
            fail(f"{name}: dp must be on the device of mask, {mask.device}, got {dp.device}")

    # Allocate
    du = new_map(mask, shape, like.dtype, channels_last)
    dshift = mask.new_empty((channels if need_shift else 0,), dtype=torch.float32)
    if batch == 0 or channels == 0:
        return du, dshift.zero_()
    if channels_last:
        kernel = pixels.tap_pixels_backward
        tile, run = tiles.tap_pixels("tap_pixels_backward", channels, height, width, like.element_size(), max_pool)
        parts = tile[0]
        programs = batch * parts * -(-channels // tile[3])
    else:
        kernel, parts = planes.tap_planes_backward, 1
        tile, run = tiles.tap_planes("tap_planes_backward", channels, height, width, like.element_size(), max_pool)
        programs = batch * -(-channels // tile[0])
    sums = mask.new_empty((batch * parts, channels), dtype=torch.float32) if need_shift else None

    # Launch
    dm_strides = (0, 0, 0, 0) if dm is None else dm.stride()
    constants = (channels, height, width, *dm_strides, *((0, 0) if dp is None else dp.stride()), max_pool, *tile, _is_wide(shape, dm_strides))
    with on_device(mask):
        launch(kernel, programs, (dm, dp, mask, du, sums), constants, *run)
        if sums is not None:
            cols = min(32, tiles.power_of_two(channels))
            launch(sum_rows, -(-channels // cols), (sums, dshift, batch * parts), (channels, 32, cols), tiles.WARPS)
    return du, dshift
