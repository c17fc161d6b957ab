"""What kernels on feature maps [B, C, H, W] share, in both layouts and directions: which program does what, the mean, the sum of d(shift).

Shapes and strides are constants of the kernels; B only sets how many programs there are, so an image's bits do not depend on its batch.
WIDE: offsets inside an image need 64 bits.
"""

import triton
import triton.language as tl

from .math import add_exactly, from_fp32, sum_of_rows, to_fp32


@triton.jit
def index(i, WIDE: tl.constexpr):
    return i.to(tl.int64) if WIDE else i


@triton.jit
def planes_of_program(C: tl.constexpr, BLOCKS: tl.constexpr, ROWS: tl.constexpr):
    """Image, channels, whether each exists [ROWS, 1] and its plane [ROWS, 1] of this program."""
    pid = tl.program_id(0)
    image = (pid // BLOCKS).to(tl.int64)
    c = pid % BLOCKS * ROWS + tl.arange(0, ROWS)
    return image, c, (c < C)[:, None], (image * C + c)[:, None]


@triton.jit
def pixels_of_program(BLOCKS: tl.constexpr, PARTS: tl.constexpr, COLS: tl.constexpr):
    """Block of channels, part, image and channels of this program."""
    pid = tl.program_id(0)
    block = pid % BLOCKS
    return block, pid // BLOCKS % PARTS, (pid // BLOCKS // PARTS).to(tl.int64), block * COLS + tl.arange(0, COLS)


@triton.jit
def on_grid_of(u, shift, c, channels: tl.constexpr):
    """shift [C] of the channels c, rounded to u's dtype, in fp32."""
    return to_fp32(from_fp32(to_fp32(tl.load(shift + c, mask=c < channels, other=0.0)), u.dtype.element_ty))


@triton.jit
def gradient_of_mean(dp, image, c, C: tl.constexpr, PIXELS: tl.constexpr, PB: tl.constexpr, PC: tl.constexpr):
    """dp [B, C] of the channels c over H W; 0 where there is no dp."""
    gp = tl.zeros([c.shape[0]], tl.float32)
    if dp is not None:  # what follows a return inside `if` is compiled all the same
        gp = tl.div_rn(tl.load(dp + image * PB + c * PC, mask=c < C, other=0.0), PIXELS * 1.0)
    return gp


@triton.jit
def store_mean(
    total,  # [ROWS, COLS] fp32, sums of v
    p,  # [B, C] fp32
    partial,  # [B, PARTS, C] fp32; None for one part
    arrivals,  # [B * BLOCKS] int32 zeros, zero again afterwards; None for one part
    image,
    part,
    block,
    c,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The mean of an NHWC map's channels c; of several parts the last to arrive adds them all, in order."""
    sums = sum_of_rows(total)
    if PARTS == 1:
        tl.store(p + image * C + c, tl.div_rn(sums, PIXELS * 1.0), mask=c < C)
    else:
        partial += image * (PARTS * C) + c
        tl.store(partial + part * C, sums, mask=c < C)
        tl.debug_barrier()
        counter = arrivals + image * BLOCKS + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            tl.debug_barrier()
            whole = tl.zeros([c.shape[0]], tl.float32)
            missing = tl.zeros([c.shape[0]], tl.float32)
            for r in range(PARTS):
                whole, missing = add_exactly(whole, missing, tl.load(partial + r * C, mask=c < C, other=0.0, cache_modifier=".cg"))
            tl.store(p + image * C + c, tl.div_rn(whole, PIXELS * 1.0), mask=c < C)
            tl.atomic_xchg(counter, 0)


# --- d(shift) -----------------------------------------------------------------------------------------------------------
@triton.jit(do_not_specialize=["count"])
def sum_rows(
    rows,  # [count, C] fp32
    out,  # [C] fp32
    count,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out[c] = the sum of rows[:, c], in one order."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(0, count, ROWS):
        r = first + tl.arange(0, ROWS)
        x = tl.load(rows + r.to(tl.int64)[:, None] * C + c[None, :], mask=(r < count)[:, None] & (c < C)[None, :], other=0.0)
        total, lost = add_exactly(total, lost, x)
    tl.store(out + c, sum_of_rows(total), mask=c < C)
