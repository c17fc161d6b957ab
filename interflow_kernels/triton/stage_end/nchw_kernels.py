"""The stage end on NCHW maps and any other strides, forward and backward. A tile is [channels, pixels]: memory runs along a plane."""

import triton
import triton.language as tl

from ..common.maps import gradient_of_mean, index, on_grid_of, planes_of_program
from ..common.math import add_exactly, from_fp32, sum_of_columns
from .kernels import ended, gradient, offsets


@triton.jit
def end_planes(
    u,  # [B, C, H, W] in any strides, best with stride 1 along W
    shift,  # [C] in u's dtype or fp32, or None
    residual,  # [B, C, H, W] in u's dtype, any strides, or None
    v,  # [B, C, H, W] in u's dtype
    p,  # [B, C] fp32
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    image, c, in_c, plane = planes_of_program(C, BLOCKS, ROWS)
    u += image * SB
    row = index(c, WIDE)[:, None]
    s = None
    if shift is not None:
        s = on_grid_of(u, shift, c, C)[:, None]
    if residual is not None:
        residual += image * RB
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, H * W, COLS):
        i = first + tl.arange(0, COLS)
        inside = in_c & (i < H * W)[None, :]
        x = tl.load(u + row * SC + offsets(i, H, W, SH, SW, WIDE)[None, :], mask=inside, other=0.0)
        r = None
        if residual is not None:
            r = tl.load(residual + row * RC + offsets(i, H, W, RH, RW, WIDE)[None, :], mask=inside, other=0.0)
        x = ended(x, s, r, inside, RELU)
        tl.store(v + plane * (H * W) + i[None, :], from_fp32(x, v.dtype.element_ty), mask=inside)
        total, lost = add_exactly(total, lost, x)
    tl.store(p + image * C + c, tl.div_rn(sum_of_columns(total), H * W * 1.0), mask=c < C)


@triton.jit
def end_planes_backward(
    dv,  # [B, C, H, W] in u's dtype, any strides, or None
    dp,  # [B, C] fp32, any strides, or None
    v,  # [B, C, H, W] in u's dtype, any strides; None: nothing is masked
    du,  # [B, C, H, W] in u's dtype
    dshift,  # [B, C] fp32, sums of d, or None
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    image, c, in_c, plane = planes_of_program(C, BLOCKS, ROWS)
    row = index(c, WIDE)[:, None]
    gp = None
    if dp is not None:
        gp = gradient_of_mean(dp, image, c, C, H * W, PB, PC)[:, None]
    if dv is not None:
        dv += image * SB
    if v is not None:
        v += image * VB
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, H * W, COLS):
        i = first + tl.arange(0, COLS)
        inside = in_c & (i < H * W)[None, :]
        g = None
        if dv is not None:
            g = tl.load(dv + row * SC + offsets(i, H, W, SH, SW, WIDE)[None, :], mask=inside, other=0.0)
        x = None
        if v is not None:
            x = tl.load(v + row * VC + offsets(i, H, W, VH, VW, WIDE)[None, :], mask=inside, other=0.0)
        d = gradient(g, gp, x, inside)
        tl.store(du + plane * (H * W) + i[None, :], from_fp32(d, du.dtype.element_ty), mask=inside)
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + image * C + c, sum_of_columns(total), mask=c < C)
