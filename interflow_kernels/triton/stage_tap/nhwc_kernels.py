"""The stage tap on NHWC maps, forward and backward. A tile is [windows or pixels, channels]: memory runs along the channels."""

import triton
import triton.language as tl

from ..common.maps import gradient_of_mean, index, on_grid_of, pixels_of_program, store_mean
from ..common.math import add_exactly, from_fp32, sum_of_rows, to_fp32
from .kernels import gradients, packed, passes_by, rectified, unpacked, window, windows


@triton.jit
def tap_pixels(
    u,  # [B, C, H, W] in any strides, best with stride 1 along C
    shift,  # [C] in u's dtype or fp32, or None
    m,  # [B, H/2, W/2, C] in u's dtype, or None
    p,  # [B, C] fp32
    mask,  # [bytes], or None
    partial,  # [B, PARTS, C] fp32, sums of v; None for one part
    arrivals,  # [B * blocks of C] int32 zeros, zero again afterwards; None for one part
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    MAX_POOL: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    ALL: tl.constexpr = (H + 1) // 2 * ((W + 1) // 2) if MAX_POOL else H * W
    BYTES: tl.constexpr = C if MAX_POOL else (C + 7) // 8  # of the mask, a window or pixel
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    block, part, image, c = pixels_of_program(BLOCKS, PARTS, COLS)
    in_c = (c < C)[None, :]
    column = index(c, WIDE)[None, :] * SC
    u += image * SB
    s = None
    if shift is not None:
        s = on_grid_of(u, shift, c, C)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        in_part = (i < ALL)[:, None]
        if MAX_POOL:
            # Four elements of each window
            h, w, _, right, below, complete = windows(i, H, W)
            right, below, complete = right[:, None], below[:, None], complete[:, None]
            corner = u + (index(2 * h, WIDE) * SH + index(2 * w, WIDE) * SW)[:, None] + column
            v0 = rectified(tl.load(corner, mask=in_part & in_c, other=0.0), s, in_part & in_c)
            v1 = rectified(tl.load(corner + SW, mask=right & in_c, other=0.0), s, right & in_c)
            v2 = rectified(tl.load(corner + SH, mask=below & in_c, other=0.0), s, below & in_c)
            v3 = rectified(tl.load(corner + (SH + SW), mask=complete & in_c, other=0.0), s, complete & in_c)
            # Maximum, mask, sum
            maximum, byte = window(v0, v1, v2, v3, complete)
            at = image * ((H // 2) * (W // 2) * C) + index(h * (W // 2) + w, WIDE)[:, None] * C + c[None, :]
            tl.store(m + at, from_fp32(maximum, m.dtype.element_ty), mask=complete & in_c)
            if mask is not None:
                tl.store(mask + image * (ALL * BYTES) + index(i, WIDE)[:, None] * BYTES + c[None, :], byte, mask=in_part & in_c)
            v = (v0 + v1) + (v2 + v3)
        else:
            at = u + (index(i // W, WIDE) * SH + index(i % W, WIDE) * SW)[:, None] + column
            v = rectified(tl.load(at, mask=in_part & in_c, other=0.0), s, in_part & in_c)
            if mask is not None:
                q = block * (COLS // 8) + tl.arange(0, COLS // 8)
                found = packed(passes_by(v, 1), ROWS, COLS // 8)
                tl.store(mask + image * (ALL * BYTES) + index(i, WIDE)[:, None] * BYTES + q[None, :], found, mask=in_part & (q < BYTES)[None, :])
        total, lost = add_exactly(total, lost, v)

    store_mean(total, p, partial, arrivals, image, part, block, c, C, H * W, PARTS, BLOCKS)


@triton.jit
def tap_pixels_backward(
    dm,  # [B, C, H/2, W/2] in u's dtype, any strides, or None
    dp,  # [B, C] fp32, any strides, or None
    mask,  # as forward wrote it
    du,  # [B, H, W, C] in u's dtype
    dshift,  # [B, PARTS, C] fp32, sums of du, or None
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
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    ALL: tl.constexpr = (H + 1) // 2 * ((W + 1) // 2) if MAX_POOL else H * W
    BYTES: tl.constexpr = C if MAX_POOL else (C + 7) // 8
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    block, part, image, c = pixels_of_program(BLOCKS, PARTS, COLS)
    in_c = (c < C)[None, :]
    du += image * (H * W * C)
    mask += image * (ALL * BYTES)
    gp = gradient_of_mean(dp, image, c, C, H * W, PB, PC)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        in_part = (i < ALL)[:, None]
        if MAX_POOL:
            h, w, _, right, below, complete = windows(i, H, W)
            right, below, complete = right[:, None], below[:, None], complete[:, None]
            byte = tl.load(mask + index(i, WIDE)[:, None] * BYTES + c[None, :], mask=in_part & in_c, other=0)
            gm = tl.zeros([ROWS, COLS], tl.float32)
            if dm is not None:
                at = dm + image * SB + (index(h, WIDE) * SH + index(w, WIDE) * SW)[:, None] + index(c, WIDE)[None, :] * SC
                gm = to_fp32(tl.load(at, mask=complete & in_c, other=0.0))
            d0, d1, d2, d3 = gradients(byte, gp, gm)
            at = du + index(2 * h * W + 2 * w, WIDE)[:, None] * C + c[None, :]
            tl.store(at, from_fp32(d0, du.dtype.element_ty), mask=in_part & in_c)
            tl.store(at + C, from_fp32(d1, du.dtype.element_ty), mask=right & in_c)
            tl.store(at + W * C, from_fp32(d2, du.dtype.element_ty), mask=below & in_c)
            tl.store(at + (W + 1) * C, from_fp32(d3, du.dtype.element_ty), mask=complete & in_c)
            d = (d0 + d1) + (d2 + d3)
        else:
            q = block * (COLS // 8) + tl.arange(0, COLS // 8)
            found = tl.load(mask + index(i, WIDE)[:, None] * BYTES + q[None, :], mask=in_part & (q < BYTES)[None, :], other=0)
            d = tl.where(unpacked(found, ROWS, COLS // 8) != 0, gp, 0.0)
            tl.store(du + index(i, WIDE)[:, None] * C + c[None, :], from_fp32(d, du.dtype.element_ty), mask=in_part & in_c)
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + (image * PARTS + part) * C + c, sum_of_rows(total), mask=c < C)
