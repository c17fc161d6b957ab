"""The head's backward kernels: `head_scores` where Z is needed, `head_gradients`, `head_attention`.

dscores [B, n, K] is the gradient of Z: A[i,k] dy[b,k] + dZ[b,i,k], or the gate's. Then

    dp_i[b,:] = sum_k dscores[b,i,k] W_i[k,:]        dW_i[k,:] = sum_b dscores[b,i,k] p_i[b,:]        db[i,k] = sum_b dscores[b,i,k]
    dA[i,k]   = sum_b dy[b,k] Z[b,i,k]               from which the attention's parameters take their sums.

Without dZ a linear mode needs no Z for dA: with G = dy^T p, dW_i = A_i G_i and dA[i,k] = W_i[k,:] . G_i[k,:] + b_i[k] sum_b dy[b,k].
The gate, g = softmax_i(s_i), s_i = sum_j M_ij z_j + c_i, y = sum_i g_i z_i: ds_i = dy g_i (z_i - y), dz_i = dy g_i + sum_l M_li ds_l,
dM_ij = sum ds_i z_j, dc_i = sum ds_i. Every sum has one order, that of dp does not depend on B.
"""

import triton
import triton.language as tl

from ..common.math import add_exactly, add_product, completed, from_fp32, sum_of_columns, sum_of_rows, sum_to_sixteen_rows, to_fp32, unknown
from .forward_kernels import branch_scores, gate_argument, gated
from .linear_kernels import CLASSWISE, FOLDED, GATED, NXN, weighted


@triton.jit(do_not_specialize=["batch"])
def head_scores(
    dy,  # [B, K], any strides
    dbranches,  # [B, n, K], any strides, or None
    pooled,  # [B, D] fp32
    weight,  # [K, D]
    bias,  # [n, K], or None
    attention_weight,
    attention_bias,
    scores,  # [B, n, K] fp32: gated, Z and in the end dz
    darguments,  # [B, n, K] fp32: gated, ds
    shares,  # [B, n, K] fp32: gated, dy g
    sums,  # gated: [programs, n n + n] fp32, dM and dc of a program, or None; linear: [image tiles, n + 1, K] fp32, dA and sum of dy
    batch,
    DY: tl.constexpr,  # [2], strides
    DZ: tl.constexpr,  # [3]
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    MODE: tl.constexpr,
    IMAGES: tl.constexpr,
    CLASSES: tl.constexpr,
    STEP: tl.constexpr,
    SPLIT: tl.constexpr,  # whether products are made of parts, on bf16 matrix units
):
    D: tl.constexpr = COLUMNS[N]
    TILES: tl.constexpr = (K + CLASSES - 1) // CLASSES
    pid = tl.program_id(0)
    image_tile = (pid // TILES).to(tl.int64)
    b = pid // TILES * IMAGES + tl.arange(0, IMAGES)
    k = pid % TILES * CLASSES + tl.arange(0, CLASSES)
    rows = b.to(tl.int64)[:, None]
    inside = (b < batch)[:, None] & (k < K)[None, :]
    g = to_fp32(tl.load(dy + rows * DY[0] + k.to(tl.int64)[None, :] * DY[1], mask=inside, other=0.0))
    at = (rows * N) * K + k[None, :]
    for i in tl.static_range(N):
        z = branch_scores(pooled, weight, bias, b, k, batch, i, COLUMNS[i], COLUMNS[i + 1] - COLUMNS[i], D, K, STEP, SPLIT)
        if MODE == GATED:
            tl.store(scores + at + i * K, z, mask=inside)
        else:
            tl.store(sums + (image_tile * (N + 1) + i) * K + k, sum_of_rows(tl.where(inside, g * z, 0.0)), mask=k < K)

    if MODE == GATED:
        # ds, from the scores that it has just written: n tiles of z do not stay in registers beside a product
        tl.debug_barrier()
        zs = ()
        for i in tl.static_range(N):
            zs = zs + (tl.load(scores + at + i * K, mask=inside, other=0.0),)
        y, largest, whole = gated(zs, attention_weight, attention_bias, batch, N, False)
        for i in range(unknown(N, batch)):
            gate = tl.div_rn(tl.exp(gate_argument(zs, attention_weight, attention_bias, i, N) - largest), whole)
            z = tl.load(scores + at + i * K, mask=inside, other=0.0)
            tl.store(darguments + at + i * K, g * gate * (z - y), mask=inside)
            tl.store(shares + at + i * K, g * gate, mask=inside)
        tl.debug_barrier()
        if sums is not None:
            # n n + n sums over this tile
            sums += pid.to(tl.int64) * (N * N + N)
            for row in range(N):
                d = tl.load(darguments + at + row * K, mask=inside, other=0.0)
                tl.store(sums + N * N + row, tl.sum(tl.sum(d, axis=1), axis=0))
                for col in range(N):
                    other = tl.load(scores + at + col * K, mask=inside, other=0.0)
                    tl.store(sums + row * N + col, tl.sum(tl.sum(d * other, axis=1), axis=0))
            tl.debug_barrier()
        # dz, in place of Z
        ds = ()
        for j in tl.static_range(N):
            ds = ds + (tl.load(darguments + at + j * K, mask=inside, other=0.0),)
        for i in range(unknown(N, batch)):
            dz = tl.load(shares + at + i * K, mask=inside, other=0.0)
            for j in tl.static_range(N):
                dz += ds[j] * to_fp32(tl.load(attention_weight + j * N + i))
            if dbranches is not None:
                dz += to_fp32(tl.load(dbranches + rows * DZ[0] + i * DZ[1] + k.to(tl.int64)[None, :] * DZ[2], mask=inside, other=0.0))
            tl.store(scores + at + i * K, dz, mask=inside)
    else:
        tl.store(sums + (image_tile * (N + 1) + N) * K + k, sum_of_rows(g), mask=k < K)


@triton.jit
def _upstream(
    dy,
    dbranches,
    dscores,
    attention_weight,
    b,
    k,
    i,
    batch,
    DY: tl.constexpr,
    DZ: tl.constexpr,
    N: tl.constexpr,
    N2: tl.constexpr,
    K: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
):
    """dscores[b, i, k] of a tile [images, classes], 0 outside; without A where that is multiplied later (SCALED)."""
    rows = b.to(tl.int64)[:, None]
    cols = k.to(tl.int64)[None, :]
    inside = (b < batch)[:, None] & (k < K)[None, :]
    if dscores is not None:
        found = tl.load(dscores + (rows * N + i) * K + cols, mask=inside, other=0.0)
    else:
        found = tl.zeros([b.shape[0], k.shape[0]], tl.float32)
        if dy is not None:
            found = to_fp32(tl.load(dy + rows * DY[0] + cols * DY[1], mask=inside, other=0.0))
            if not SCALED:
                found = weighted(found, attention_weight, i, k, MODE, N, N2, K)
        if dbranches is not None:
            found += to_fp32(tl.load(dbranches + rows * DZ[0] + i * DZ[1] + cols * DZ[2], mask=inside, other=0.0))
    return found


@triton.jit(do_not_specialize=["batch"])
def head_gradients(
    dy,  # [B, K], any strides, or None
    dbranches,  # [B, n, K], any strides, or None
    dscores,  # [B, n, K] fp32 from head_scores, or None: then dy and dbranches give it
    pooled,  # [B, D] fp32
    weight,  # [K, D]
    bias,  # [n, K], or None
    attention_weight,
    dpooled,  # [B, D] fp32, or None
    dweight,  # [K, D], or None
    dbias,  # [n, K], or None
    sums,  # [tiles of D + 1, K] fp32: dA by tile, then the sum of dy; or None
    batch,
    DY: tl.constexpr,
    DZ: tl.constexpr,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,
    FIRST: tl.constexpr,  # [n + 1], tiles of WIDE columns before each stage
    NEEDED: tl.constexpr,  # [n], whether a stage's dpooled is wanted
    FIRST_IMAGES: tl.constexpr,  # programs that sum over images come first: how many
    ALIGNED: tl.constexpr,  # a power of two that divides every stage's first column
    K: tl.constexpr,
    MODE: tl.constexpr,
    SCALED: tl.constexpr,
    N2: tl.constexpr,
    IMAGES: tl.constexpr,
    CLASSES: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT: tl.constexpr,
):
    D: tl.constexpr = COLUMNS[N]
    TILES: tl.constexpr = FIRST[N]
    pid = tl.program_id(0)
    over_images = pid < FIRST_IMAGES
    place = tl.where(over_images, pid, pid - FIRST_IMAGES)
    t = place % TILES
    other = place // TILES

    # Which stage, which of its columns
    i = 0
    first = 0
    end = 0
    needed = 0
    for s in tl.static_range(N):
        here = (t >= FIRST[s]) & (t < FIRST[s + 1])
        i = tl.where(here, s, i)
        first = tl.where(here, COLUMNS[s] + (t - FIRST[s]) * WIDE, first)
        end = tl.where(here, COLUMNS[s + 1], end)
        needed = tl.where(here, NEEDED[s], needed)
    leads = 0
    for s in tl.static_range(N):
        leads = tl.where(t == FIRST[s], 1, leads)
    d = tl.multiple_of(first, ALIGNED) + tl.arange(0, WIDE)
    in_d = (d < end)[None, :]

    if over_images:
        # dW, and what only sums over images
        k = other * CLASSES + tl.arange(0, CLASSES)
        in_k = k < K
        leading = in_k & (k * 0 + leads == 1)
        total = tl.zeros([CLASSES, WIDE], tl.float32)
        missing = tl.zeros([CLASSES, WIDE], tl.float32)
        upstream = tl.zeros([16, CLASSES], tl.float32)
        lost = tl.zeros([16, CLASSES], tl.float32)
        for start in range(0, batch, IMAGES):
            b = start + tl.arange(0, IMAGES)
            g = _upstream(dy, dbranches, dscores, attention_weight, b, k, i, batch, DY, DZ, N, N2, K, MODE, SCALED)
            p = tl.load(pooled + b.to(tl.int64)[:, None] * D + d[None, :], mask=(b < batch)[:, None] & in_d, other=0.0)
            total, missing = add_product(total, missing, tl.trans(g), p, SPLIT)
            upstream, lost = add_exactly(upstream, lost, sum_to_sixteen_rows(g))
        upstream = sum_of_rows(upstream)
        total = completed(total, missing)
        at = k.to(tl.int64)[:, None] * D + d[None, :]
        if dweight is not None:
            dw = total
            if SCALED:
                dw = weighted(total, attention_weight, i, k, MODE, N, N2, K, True)
            tl.store(dweight + at, from_fp32(dw, dweight.dtype.element_ty), mask=in_k[:, None] & in_d)
        if dbias is not None:
            db = upstream
            if SCALED:
                db = weighted(upstream, attention_weight, i, k, MODE, N, N2, K)
            tl.store(dbias + i * K + k, from_fp32(db, dbias.dtype.element_ty), mask=leading)
        if sums is not None:
            w = to_fp32(tl.load(weight + at, mask=in_k[:, None] & in_d, other=0.0))
            da = sum_of_columns(w * total)
            if bias is not None:
                da += to_fp32(tl.load(bias + i * K + k, mask=leading, other=0.0)) * upstream
            tl.store(sums + t.to(tl.int64) * K + k, da, mask=in_k)
            tl.store(sums + TILES * K + k, upstream, mask=in_k & (k * 0 + t == 0))
    elif dpooled is not None:
        # dp. A name of both branches must have one type in both
        b = other * IMAGES + tl.arange(0, IMAGES)
        dp = tl.zeros([IMAGES, WIDE], tl.float32)
        rest = tl.zeros([IMAGES, WIDE], tl.float32)
        for start in range(0, needed * K, CLASSES):
            k = start + tl.arange(0, CLASSES)
            g = _upstream(dy, dbranches, dscores, attention_weight, b, k, i, batch, DY, DZ, N, N2, K, MODE, False)
            w = tl.load(weight + k.to(tl.int64)[:, None] * D + d[None, :], mask=(k < K)[:, None] & in_d, other=0.0)
            dp, rest = add_product(dp, rest, g, w, SPLIT)
        dp = completed(dp, rest)
        tl.store(dpooled + b.to(tl.int64)[:, None] * D + d[None, :], dp, mask=(b < batch)[:, None] & in_d)


@triton.jit
def _rows_sum(sums, k, first, count, step, K: tl.constexpr):
    """sum over r < count of sums[first + r step, k]."""
    total = tl.zeros([k.shape[0]], tl.float32)
    lost = tl.zeros([k.shape[0]], tl.float32)
    for r in range(count):
        at = (first + r * step) * K
        total, lost = add_exactly(total, lost, tl.load(sums + at + k, mask=k < K, other=0.0))
    return total


@triton.jit(do_not_specialize=["count"])
def head_attention(
    sums,  # [rows, K] fp32
    dweight,  # the attention weight's gradient, or None
    dbias,  # the attention bias's gradient, or None
    count,  # rows of a stage, where all have as many
    N: tl.constexpr,
    FIRST: tl.constexpr,  # [n + 1] rows before each stage and before the sum of dy; None: rows of all stages alternate
    K: tl.constexpr,
    MODE: tl.constexpr,
    N2: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """dA and the sum of dy, summed over rows -> gradients in the shapes of the attention's parameters. One program; classwise many."""
    PER_CLASS: tl.constexpr = (MODE == CLASSWISE) or (MODE == FOLDED)
    column = tl.program_id(0) * CLASSES + tl.arange(0, CLASSES)
    for i in tl.static_range(N + 1):
        if (i < N and dweight is not None) or (i == N and dbias is not None):
            whole = tl.zeros([CLASSES], tl.float32)
            lost = tl.zeros([CLASSES], tl.float32)
            for start in range(0, CLASSES if PER_CLASS else K, CLASSES):
                k = start + column
                if FIRST is None:
                    found = _rows_sum(sums, k, i, count, N + 1, K)
                elif i < N:
                    found = _rows_sum(sums, k, FIRST[i], FIRST[i + 1] - FIRST[i], 1, K)
                else:
                    found = _rows_sum(sums, k, FIRST[N], 1, 1, K)
                whole, lost = add_exactly(whole, lost, found)
            if PER_CLASS:
                if i < N:
                    tl.store(dweight + i * K + column, from_fp32(whole, dweight.dtype.element_ty), mask=column < K)
                else:
                    tl.store(dbias + column, from_fp32(whole, dbias.dtype.element_ty), mask=column < K)
            else:
                j = tl.arange(0, N2)
                one = tl.zeros([N2], tl.float32) + tl.sum(whole, axis=0)
                if MODE == NXN:  # all n outputs are summed: the rows of M have one gradient
                    if i < N:
                        tl.store(dweight + j * N + i, from_fp32(one, dweight.dtype.element_ty), mask=j < N)
                    else:
                        tl.store(dbias + j, from_fp32(one, dbias.dtype.element_ty), mask=j < N)
                elif i < N:
                    tl.store(dweight + i + j, from_fp32(one, dweight.dtype.element_ty), mask=j < 1)
                else:
                    tl.store(dbias + j, from_fp32(one, dbias.dtype.element_ty), mask=j < 1)


@triton.jit(do_not_specialize=["count"])
def head_gate(
    sums,  # [count, n n + n] fp32
    dmatrix,  # [n, n], or None
    doffset,  # [n], or None
    count,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """dM and dc: sums over the programs of head_scores."""
    WIDTH: tl.constexpr = N * N + N
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, count, ROWS):
        r = first + tl.arange(0, ROWS)
        x = tl.load(sums + r.to(tl.int64)[:, None] * WIDTH + c[None, :], mask=(r < count)[:, None] & (c < WIDTH)[None, :], other=0.0)
        total, lost = add_exactly(total, lost, x)
    found = sum_of_rows(total)
    if dmatrix is not None:
        tl.store(dmatrix + c, from_fp32(found, dmatrix.dtype.element_ty), mask=c < N * N)
    if doffset is not None:
        tl.store(doffset + c - N * N, from_fp32(found, doffset.dtype.element_ty), mask=(c >= N * N) & (c < WIDTH))
