"""The head's forward kernels: `head_pool` takes means of maps, `head_tail` multiplies and aggregates.

    p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw)))   [B, D_i]   pooled
    z_i = p_i W_i^T + b_i                               [B, K]     branch scores, Z = stack(z_i): [B, n, K]
    y   = attention(Z)                                  [B, K]     logits

Shapes and strides are constants of a kernel, B is not: it only sets how many programs there are, so an image's bits do not
depend on its batch. A map too large for one program is pooled in parts, whose sums the tail adds in order; so there are two
launches, without counters or barriers between programs.
"""

import triton
import triton.language as tl

from ..common.math import add_exactly, add_product, completed, from_fp32, sum_of_rows, to_fp32, unknown
from .linear_kernels import GATED, linear_offset, weighted

STAGE_FIELDS: tl.constexpr = tl.constexpr(16)  # of a stage in STAGES, in the order of pool_unit's constants


# --- pooling ------------------------------------------------------------------------------------------------------------
@triton.jit
def pool_unit(
    x,  # [B, C, H, W] in any strides
    pooled,  # [B, D] fp32
    partial,  # [B, PARTIAL_D] fp32, or None
    image,
    unit,  # of this stage: block of channels, then part or bin
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SB: tl.constexpr,
    SC: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,  # pixels
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    COLUMN: tl.constexpr,  # of pooled
    PARTIAL_COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    BINS_H: tl.constexpr,
    BINS_W: tl.constexpr,
    D: tl.constexpr,
    PARTIAL_D: tl.constexpr,
):
    BINS: tl.constexpr = BINS_H * BINS_W
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    c = unit % BLOCKS * COLS + tl.arange(0, COLS)
    part = unit // BLOCKS
    in_c = (c < C)[None, :]
    x += image * SB + (c.to(tl.int64) if WIDE else c)[None, :] * SC
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    if BINS == 1:
        for first in range(0, PART, ROWS):
            i = part * PART + first + tl.arange(0, ROWS)
            j = i.to(tl.int64) if WIDE else i
            offset = j * SW if SH == W * SW or H == 1 else (j // W) * SH + (j % W) * SW
            total, lost = add_exactly(total, lost, to_fp32(tl.load(x + offset[:, None], mask=(i < H * W)[:, None] & in_c, other=0.0)))
        sums = sum_of_rows(total)
        if PARTS == 1:
            tl.store(pooled + image * D + COLUMN + c, tl.div_rn(sums, H * W * 1.0), mask=c < C)
        else:
            tl.store(partial + image * PARTIAL_D + PARTIAL_COLUMN + part * C + c, sums, mask=c < C)
    else:
        # One adaptive window
        h = part // BINS_W
        w = part % BINS_W
        h0 = h * H // BINS_H
        w0 = w * W // BINS_W
        width = ((w + 1) * W + BINS_W - 1) // BINS_W - w0
        count = (((h + 1) * H + BINS_H - 1) // BINS_H - h0) * width
        for first in range(0, count, ROWS):
            i = first + tl.arange(0, ROWS)
            row = h0 + i // width
            col = w0 + i % width
            offset = (row.to(tl.int64) if WIDE else row) * SH + (col.to(tl.int64) if WIDE else col) * SW
            total, lost = add_exactly(total, lost, to_fp32(tl.load(x + offset[:, None], mask=(i < count)[:, None] & in_c, other=0.0)))
        tl.store(pooled + image * D + COLUMN + c * BINS + part, tl.div_rn(sum_of_rows(total), count.to(tl.float32)), mask=c < C)


@triton.jit
def head_pool(
    x0,  # features of up to 16 stages, None behind the last
    x1,
    x2,
    x3,
    x4,
    x5,
    x6,
    x7,
    x8,
    x9,
    x10,
    x11,
    x12,
    x13,
    x14,
    x15,
    pooled,  # [B, D] fp32: of stages in one part
    partial,  # [B, PARTIAL_D] fp32: sums of the others, [PARTS, C] each; None where there are none
    N: tl.constexpr,
    STAGES: tl.constexpr,  # N * STAGE_FIELDS numbers
    FIRST: tl.constexpr,  # [N + 1], units of an image before each stage
    D: tl.constexpr,
    PARTIAL_D: tl.constexpr,
):
    xs = (x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15)
    pid = tl.program_id(0)
    image = (pid // FIRST[N]).to(tl.int64)
    unit = pid % FIRST[N]
    for i in tl.static_range(N):
        if (unit >= FIRST[i]) & (unit < FIRST[i + 1]):
            pool_unit(
                xs[i],
                pooled,
                partial,
                image,
                unit - FIRST[i],
                STAGES[i * STAGE_FIELDS + 0],
                STAGES[i * STAGE_FIELDS + 1],
                STAGES[i * STAGE_FIELDS + 2],
                STAGES[i * STAGE_FIELDS + 3],
                STAGES[i * STAGE_FIELDS + 4],
                STAGES[i * STAGE_FIELDS + 5],
                STAGES[i * STAGE_FIELDS + 6],
                STAGES[i * STAGE_FIELDS + 7],
                STAGES[i * STAGE_FIELDS + 8],
                STAGES[i * STAGE_FIELDS + 9],
                STAGES[i * STAGE_FIELDS + 10],
                STAGES[i * STAGE_FIELDS + 11],
                STAGES[i * STAGE_FIELDS + 12],
                STAGES[i * STAGE_FIELDS + 13],
                STAGES[i * STAGE_FIELDS + 14],
                STAGES[i * STAGE_FIELDS + 15],
                D,
                PARTIAL_D,
            )


# --- product ------------------------------------------------------------------------------------------------------------
@triton.jit
def pooled_tile(pooled, b, d, batch, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """pooled[b, COLUMN + d], 0 outside: [images, columns of a stage]."""
    return tl.load(pooled + b.to(tl.int64)[:, None] * D + COLUMN + d[None, :], mask=(b < batch)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def weight_tile(weight, k, d, COLUMN: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, K: tl.constexpr):
    """weight[k, COLUMN + d], 0 outside: [classes, columns of a stage]."""
    return tl.load(weight + k.to(tl.int64)[:, None] * D + COLUMN + d[None, :], mask=(k < K)[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def with_bias(z, bias, k, STAGE: tl.constexpr, K: tl.constexpr):
    if bias is not None:
        z += to_fp32(tl.load(bias + STAGE * K + k, mask=k < K, other=0.0))[None, :]
    return z


@triton.jit
def branch_scores(
    pooled,
    weight,
    bias,
    b,
    k,
    batch,
    STAGE: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """z_i of a tile of images and classes, from pooled."""
    z = tl.zeros([b.shape[0], k.shape[0]], tl.float32)
    rest = tl.zeros([b.shape[0], k.shape[0]], tl.float32)
    for first in range(0, unknown(WIDTH, batch), STEP):
        d = first + tl.arange(0, STEP)
        p = pooled_tile(pooled, b, d, batch, COLUMN, WIDTH, D)
        z, rest = add_product(z, rest, p, tl.trans(weight_tile(weight, k, d, COLUMN, WIDTH, D, K)), SPLIT)
    return with_bias(completed(z, rest), bias, k, STAGE, K)


@triton.jit
def gate_argument(zs, matrix, offset, i, N: tl.constexpr):
    """s_i = sum_j M_ij z_j + c_i of a tile."""
    s = zs[0] * 0.0 + to_fp32(tl.load(offset + i))
    for j in tl.static_range(N):
        s += zs[j] * to_fp32(tl.load(matrix + i * N + j))
    return s


@triton.jit
def chosen(zs, i, N: tl.constexpr):
    """zs[i]; i is known only at run time."""
    z = zs[0]
    for j in tl.static_range(1, N):
        z = tl.where(i == j, zs[j], z)
    return z


@triton.jit
def gated(zs, matrix, offset, batch, N: tl.constexpr, UNROLLED: tl.constexpr):
    """y = sum_i softmax_i(s_i) z_i of a tile; the largest s_i and sum_i exp(s_i - largest).

    Unrolled, code grows with n n and n tiles of s stand beside n of z. Else loops over i compute s_i twice, with the same bits.
    """
    whole = tl.zeros([zs[0].shape[0], zs[0].shape[1]], tl.float32)
    y = whole
    largest = whole + float("-inf")
    if UNROLLED:
        arguments = ()
        for i in tl.static_range(N):
            arguments = arguments + (gate_argument(zs, matrix, offset, i, N),)
            largest = tl.maximum(largest, arguments[i])
        for i in tl.static_range(N):
            e = tl.exp(arguments[i] - largest)
            whole += e
            y += e * zs[i]
    else:
        for i in range(unknown(N, batch)):
            largest = tl.maximum(largest, gate_argument(zs, matrix, offset, i, N))
        for i in range(unknown(N, batch)):
            e = tl.exp(gate_argument(zs, matrix, offset, i, N) - largest)
            whole += e
            y += e * chosen(zs, i, N)
    return tl.div_rn(y, whole), largest, whole


@triton.jit
def _finished_scores(
    x,
    pooled,
    partial,
    weight,
    b,
    k,
    batch,
    tile,
    DIRECT: tl.constexpr,
    STRIDES: tl.constexpr,
    STAGE: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTIAL_COLUMN: tl.constexpr,
    PARTIAL_D: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """p_i W_i^T of a tile of images and classes. Completes pooled: from the feature x itself, or from sums of parts."""
    rows = b.to(tl.int64)[:, None]
    z = tl.zeros([b.shape[0], k.shape[0]], tl.float32)
    rest = tl.zeros([b.shape[0], k.shape[0]], tl.float32)
    for first in range(0, unknown(WIDTH, batch), STEP):
        d = first + tl.arange(0, STEP)
        inside = (b < batch)[:, None] & (d < WIDTH)[None, :]
        if DIRECT:
            p = to_fp32(tl.load(x + rows * STRIDES[2 * STAGE] + d.to(tl.int64)[None, :] * STRIDES[2 * STAGE + 1], mask=inside, other=0.0))
        elif PARTS > 1:
            p = tl.zeros([b.shape[0], STEP], tl.float32)
            lost = tl.zeros([b.shape[0], STEP], tl.float32)
            for r in range(PARTS):
                p, lost = add_exactly(p, lost, tl.load(partial + rows * PARTIAL_D + PARTIAL_COLUMN + r * WIDTH + d[None, :], mask=inside, other=0.0))
            p = tl.div_rn(p, PIXELS * 1.0)
        else:
            p = pooled_tile(pooled, b, d, batch, COLUMN, WIDTH, D)
        if (DIRECT or PARTS > 1) and tile == 0:
            tl.store(pooled + rows * D + COLUMN + d[None, :], p, mask=inside)
        z, rest = add_product(z, rest, p, tl.trans(weight_tile(weight, k, d, COLUMN, WIDTH, D, K)), SPLIT)
    return completed(z, rest)


@triton.jit(do_not_specialize=["batch"])
def head_tail(
    x0,  # already pooled features [B, D_i] of up to four stages, any strides, or None: then pooled and partial hold them
    x1,
    x2,
    x3,
    pooled,  # [B, D] fp32: read, and written where this kernel completes it
    partial,  # [B, PARTIAL_D] fp32, or None
    weight,  # [K, D]
    bias,  # [n, K], or None
    attention_weight,  # by mode, or None
    attention_bias,  # by mode, or None
    y,  # [B, K]
    branches,  # [B, n, K], or None
    batch,
    N: tl.constexpr,
    DIRECT: tl.constexpr,  # whether x0... are given
    STRIDES: tl.constexpr,  # [2 n], of x0...
    COLUMNS: tl.constexpr,  # [n + 1], columns before each stage
    PARTS: tl.constexpr,  # [n]
    PIXELS: tl.constexpr,  # [n], H W
    PARTIAL_COLUMNS: tl.constexpr,  # [n]
    PARTIAL_D: tl.constexpr,
    K: tl.constexpr,
    MODE: tl.constexpr,
    N2: tl.constexpr,
    IMAGES: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,  # whether products are made of parts, on bf16 matrix units
):
    D: tl.constexpr = COLUMNS[N]
    xs = (x0, x1, x2, x3, None, None, None, None, None, None, None, None, None, None, None, None)
    pid = tl.program_id(0)
    tile = pid % ((K + CLASSES - 1) // CLASSES)
    b = pid // ((K + CLASSES - 1) // CLASSES) * IMAGES + tl.arange(0, IMAGES)
    k = tile * CLASSES + tl.arange(0, CLASSES)
    rows = b.to(tl.int64)[:, None]
    result = tl.zeros([IMAGES, CLASSES], tl.float32)
    zs = ()

    for i in tl.static_range(N):
        z = _finished_scores(
            xs[i],
            pooled,
            partial,
            weight,
            b,
            k,
            batch,
            tile,
            DIRECT,
            STRIDES,
            i,
            COLUMNS[i],
            COLUMNS[i + 1] - COLUMNS[i],
            D,
            PARTS[i],
            PIXELS[i],
            PARTIAL_COLUMNS[i],
            PARTIAL_D,
            K,
            STEP,
            SPLIT,
        )
        z = with_bias(z, bias, k, i, K)
        if branches is not None:
            at = branches + (rows * N + i) * K + k[None, :]
            tl.store(at, from_fp32(z, branches.dtype.element_ty), mask=(b < batch)[:, None] & (k < K)[None, :])
        # Its share of y
        if MODE == GATED:
            zs = zs + (z,)
        else:
            result += weighted(z, attention_weight, i, k, MODE, N, N2, K)

    if MODE == GATED:
        result, _, _ = gated(zs, attention_weight, attention_bias, batch, N, SPLIT)  # NVIDIA's compiler spills z of 16 stages in the loops
    elif attention_bias is not None:
        result += linear_offset(attention_bias, k, MODE, N, N2, K)[None, :]
    tl.store(y + rows * K + k[None, :], from_fp32(result, y.dtype.element_ty), mask=(b < batch)[:, None] & (k < K)[None, :])
