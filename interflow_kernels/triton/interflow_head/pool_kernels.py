"""interflow_pool's kernel: the head's first launch (forward_kernels.py), finished by itself.

    p_i = flatten(adaptive_avg_pool2d(x_i, (Sh, Sw)))   [B, D_i]   pooled

A map too large for one program is pooled in parts; the last of an image's parts to arrive adds them all, in the order in which the
head's second launch does.
"""

import triton
import triton.language as tl

from ..common.math import add_exactly
from .forward_kernels import STAGE_FIELDS, pool_unit


@triton.jit
def _meet(
    pooled,  # [B, D] fp32
    partial,  # [B, PARTIAL_D] fp32
    counter,  # of this block of channels
    image,
    block,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    COLS: tl.constexpr,
    COLUMN: tl.constexpr,
    PARTIAL_COLUMN: tl.constexpr,
    D: tl.constexpr,
    PARTIAL_D: tl.constexpr,
):
    c = block * COLS + tl.arange(0, COLS)
    partial += image * PARTIAL_D + PARTIAL_COLUMN + c
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
        tl.debug_barrier()
        whole = tl.zeros([COLS], tl.float32)
        missing = tl.zeros([COLS], tl.float32)
        for r in range(PARTS):
            whole, missing = add_exactly(whole, missing, tl.load(partial + r * C, mask=c < C, other=0.0, cache_modifier=".cg"))
        tl.store(pooled + image * D + COLUMN + c, tl.div_rn(whole, PIXELS * 1.0), mask=c < C)
        tl.atomic_xchg(counter, 0)


@triton.jit
def head_pool_whole(
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
    pooled,  # [B, D] fp32
    partial,  # [B, PARTIAL_D] fp32: sums of the parts of maps, [PARTS, C] each; None where there are none
    arrivals,  # [B * FIRST[N]] int32 zeros, zero again afterwards; None likewise
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
            if STAGES[i * STAGE_FIELDS + 7] > 1:
                block = (unit - FIRST[i]) % ((STAGES[i * STAGE_FIELDS] + STAGES[i * STAGE_FIELDS + 10] - 1) // STAGES[i * STAGE_FIELDS + 10])
                _meet(
                    pooled,
                    partial,
                    arrivals + image * FIRST[N] + FIRST[i] + block,
                    image,
                    block,
                    STAGES[i * STAGE_FIELDS],
                    STAGES[i * STAGE_FIELDS + 1] * STAGES[i * STAGE_FIELDS + 2],
                    STAGES[i * STAGE_FIELDS + 7],
                    STAGES[i * STAGE_FIELDS + 10],
                    STAGES[i * STAGE_FIELDS + 11],
                    STAGES[i * STAGE_FIELDS + 12],
                    D,
                    PARTIAL_D,
                )
