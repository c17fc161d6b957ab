"""The stage end on NHWC maps, forward and backward. A tile is [pixels, channels]: memory runs along the channels."""

import triton
import triton.language as tl

from ..common.maps import gradient_of_mean, index, on_grid_of, pixels_of_program, store_mean
from ..common.math import add_exactly, from_fp32, sum_of_rows
from .kernels import ended, gradient, offsets


@triton.jit
def end_pixels(
    u,  # [B, C, H, W] in any strides, best with stride 1 along C
    shift,  # [C] in u's dtype or fp32, or None
    residual,  # [B, C, H, W] in u's dtype, any strides, or None
    v,  # [B, H, W, C] in u's dtype
    p,  # [B, C] fp32
    partial,  # [B, PARTS, C] fp32, sums of v; None for one part
    arrivals,  # [B * blocks of C] int32 zeros, zero again afterwards; None for one part
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    RB: tl.constexpr,
    RC: tl.constexpr,
    RH: tl.constexpr,
    RW: tl.constexpr,
    RELU: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    block, part, image, c = pixels_of_program(BLOCKS, PARTS, COLS)
    in_c = (c < C)[None, :]
    column = index(c, WIDE)[None, :]
    u += image * SB
    v += image * (H * W * C)
    s = None
    if shift is not None:
        s = on_grid_of(u, shift, c, C)[None, :]
    if residual is not None:
        residual += image * RB
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        inside = (i < H * W)[:, None] & in_c
        x = tl.load(u + offsets(i, H, W, SH, SW, WIDE)[:, None] + column * SC, mask=inside, other=0.0)
        r = None
        if residual is not None:
            r = tl.load(residual + offsets(i, H, W, RH, RW, WIDE)[:, None] + column * RC, mask=inside, other=0.0)
        x = ended(x, s, r, inside, RELU)
        tl.store(v + index(i, WIDE)[:, None] * C + c[None, :], from_fp32(x, v.dtype.element_ty), mask=inside)
        total, lost = add_exactly(total, lost, x)
    store_mean(total, p, partial, arrivals, image, part, block, c, C, H * W, PARTS, BLOCKS)


@triton.jit
def end_pixels_backward(
    dv,  # [B, C, H, W] in u's dtype, any strides, or None
    dp,  # [B, C] fp32, any strides, or None
    v,  # [B, C, H, W] in u's dtype, any strides; None: nothing is masked
    du,  # [B, H, W, C] in u's dtype
    dshift,  # [B, PARTS, C] fp32, sums of d, or None
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    VB: tl.constexpr,
    VC: tl.constexpr,
    VH: tl.constexpr,
    VW: tl.constexpr,
    PB: tl.constexpr,
    PC: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    _, part, image, c = pixels_of_program(BLOCKS, PARTS, COLS)
    in_c = (c < C)[None, :]
    column = index(c, WIDE)[None, :]
    du += image * (H * W * C)
    gp = None
    if dp is not None:
        gp = gradient_of_mean(dp, image, c, C, H * W, PB, PC)[None, :]
    if dv is not None:
        dv += image * SB
    if v is not None:
        v += image * VB
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        inside = (i < H * W)[:, None] & in_c
        g = None
        if dv is not None:
            g = tl.load(dv + offsets(i, H, W, SH, SW, WIDE)[:, None] + column * SC, mask=inside, other=0.0)
        x = None
        if v is not None:
            x = tl.load(v + offsets(i, H, W, VH, VW, WIDE)[:, None] + column * VC, mask=inside, other=0.0)
        d = gradient(g, gp, x, inside)
        tl.store(du + index(i, WIDE)[:, None] * C + c[None, :], from_fp32(d, du.dtype.element_ty), mask=inside)
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + (image * PARTS + part) * C + c, sum_of_rows(total), mask=c < C)
