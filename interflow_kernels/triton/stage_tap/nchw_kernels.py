"""The stage tap on NCHW maps and any other strides, forward and backward. A tile is [channels, windows or pixels]: memory runs along a plane."""

import triton
import triton.language as tl

from ..common.maps import gradient_of_mean, index, on_grid_of, planes_of_program
from ..common.math import add_exactly, from_fp32, sum_of_columns, to_fp32
from .kernels import gradients, packed, passes_by, rectified, unpacked, window, windows


@triton.jit
def _elements(first, in_c, H: tl.constexpr, W: tl.constexpr, COLS: tl.constexpr):
    """Row of windows and column of the elements of both rows of COLS windows; which of the upper and of the lower row are in the map."""
    WW: tl.constexpr = (W + 1) // 2
    e = 2 * first + tl.arange(0, 2 * COLS)
    h = e // (2 * WW)
    w = e % (2 * WW)
    upper = in_c & ((e < (H + 1) // 2 * (2 * WW)) & (w < W))[None, :]
    lower = upper & (2 * h + 1 < H)[None, :] if H % 2 else upper
    return h, w, upper, lower


@triton.jit
def tap_planes(
    u,  # [B, C, H, W] in any strides, best with stride 1 along W
    shift,  # [C] in u's dtype or fp32, or None
    m,  # [B, C, H/2, W/2] in u's dtype, or None
    p,  # [B, C] fp32
    mask,  # [bytes], or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    MAX_POOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    ALL: tl.constexpr = (H + 1) // 2 * ((W + 1) // 2) if MAX_POOL else H * W
    BYTES: tl.constexpr = ALL if MAX_POOL else (ALL + 7) // 8  # of the mask, a plane
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    image, c, in_c, plane = planes_of_program(C, BLOCKS, ROWS)
    u += image * SB
    row = index(c, WIDE)[:, None] * SC
    s = None
    if shift is not None:
        s = on_grid_of(u, shift, c, C)[:, None]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, ALL, COLS):
        i = first + tl.arange(0, COLS)
        if MAX_POOL:
            # Both rows of the windows, element by element: memory runs along them
            h, w, upper, lower = _elements(first, in_c, H, W, COLS)
            at = u + row + (index(2 * h, WIDE) * SH + index(w, WIDE) * SW)[None, :]
            above = rectified(tl.load(at, mask=upper, other=0.0), s, upper)
            beneath = rectified(tl.load(at + SH, mask=lower, other=0.0), s, lower)
            # Maximum, mask, sum
            v0, v1 = tl.split(tl.reshape(above, [ROWS, COLS, 2]))
            v2, v3 = tl.split(tl.reshape(beneath, [ROWS, COLS, 2]))
            ih, iw, _, _, _, complete = windows(i, H, W)
            complete = in_c & complete[None, :]
            maximum, byte = window(v0, v1, v2, v3, complete)
            place = i if H % 2 == 0 and W % 2 == 0 else ih * (W // 2) + iw
            tl.store(m + plane * ((H // 2) * (W // 2)) + place[None, :], from_fp32(maximum, m.dtype.element_ty), mask=complete)
            if mask is not None:
                tl.store(mask + plane * BYTES + i[None, :], byte, mask=in_c & (i < ALL)[None, :])
            v = (v0 + v1) + (v2 + v3)
        else:
            inside = in_c & (i < ALL)[None, :]
            offset = index(i, WIDE) * SW if SH == W * SW or H == 1 else index(i // W, WIDE) * SH + index(i % W, WIDE) * SW
            v = rectified(tl.load(u + row + offset[None, :], mask=inside, other=0.0), s, inside)
            if mask is not None:
                q = first // 8 + tl.arange(0, COLS // 8)
                tl.store(mask + plane * BYTES + q[None, :], packed(passes_by(v, 1), ROWS, COLS // 8), mask=in_c & (q < BYTES)[None, :])
        total, lost = add_exactly(total, lost, v)
    tl.store(p + image * C + c, tl.div_rn(sum_of_columns(total), H * W * 1.0), mask=c < C)


@triton.jit
def tap_planes_backward(
    dm,  # [B, C, H/2, W/2] in u's dtype, any strides, or None
    dp,  # [B, C] fp32, any strides, or None
    mask,  # as forward wrote it
    du,  # [B, C, H, W] in u's dtype
    dshift,  # [B, C] fp32, sums of du, or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PB: tl.constexpr,
    PC: tl.constexpr,
    MAX_POOL: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    ALL: tl.constexpr = (H + 1) // 2 * ((W + 1) // 2) if MAX_POOL else H * W
    BYTES: tl.constexpr = ALL if MAX_POOL else (ALL + 7) // 8
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    image, c, in_c, plane = planes_of_program(C, BLOCKS, ROWS)
    gp = gradient_of_mean(dp, image, c, C, H * W, PB, PC)[:, None]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, ALL, COLS):
        i = first + tl.arange(0, COLS)
        if MAX_POOL:
            byte = tl.load(mask + plane * BYTES + i[None, :], mask=in_c & (i < ALL)[None, :], other=0)
            gm = tl.zeros([ROWS, COLS], tl.float32)
            if dm is not None:
                ih, iw, _, _, _, complete = windows(i, H, W)
                at = dm + image * SB + index(c, WIDE)[:, None] * SC + (index(ih, WIDE) * SH + index(iw, WIDE) * SW)[None, :]
                gm = to_fp32(tl.load(at, mask=in_c & complete[None, :], other=0.0))
            d0, d1, d2, d3 = gradients(byte, gp, gm)
            # Both rows of the windows, element by element
            h, w, upper, lower = _elements(first, in_c, H, W, COLS)
            at = du + plane * (H * W) + (2 * h * W + w)[None, :]
            tl.store(at, from_fp32(tl.interleave(d0, d1), du.dtype.element_ty), mask=upper)
            tl.store(at + W, from_fp32(tl.interleave(d2, d3), du.dtype.element_ty), mask=lower)
            d = (d0 + d1) + (d2 + d3)
        else:
            q = first // 8 + tl.arange(0, COLS // 8)
            found = tl.load(mask + plane * BYTES + q[None, :], mask=in_c & (q < BYTES)[None, :], other=0)
            d = tl.where(unpacked(found, ROWS, COLS // 8) != 0, gp, 0.0)
            tl.store(du + plane * (H * W) + i[None, :], from_fp32(d, du.dtype.element_ty), mask=in_c & (i < ALL)[None, :])
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + image * C + c, sum_of_columns(total), mask=c < C)
