"""The stage tap's kernels, on NHWC maps (`tap_pixels`) and on all others (`tap_planes`), and their backward.

    v = relu(u + shift)        [B, C, H, W]              each step rounded to u's dtype; never written
    m = max_pool2d(v, 2, 2)    [B, C, H/2, W/2]          rounded down
    p = mean of v over H, W    [B, C]
    du = passes * dp / (H * W) + is the maximum * dm     dshift = sum of du over B, H, W

The mask is that of csrc/stage_tap.h, byte for byte. Shapes and strides are constants of the kernel; B only sets how many
programs there are, so an image's bits do not depend on its batch. A tile is [windows or pixels, channels] on NHWC and
[channels, windows or pixels] elsewhere: memory runs along its second dimension. WIDE: offsets inside an image need 64 bits.
"""

import triton
import triton.language as tl

from ._math import add_exactly, from_fp32, sum_of_rows, to_fp32


@triton.jit
def _rectified(u, shift, inside):
    """relu(u + shift) in fp32, rounded to u's dtype; NaN and -0 stay; 0 outside the map. shift: fp32, on u's grid, or None."""
    x = to_fp32(u)
    if shift is not None:
        x = to_fp32(from_fp32(x + shift, u.dtype))
    return tl.where((x < 0.0) | ~inside, 0.0, x)


@triton.jit
def _on_grid_of(u, shift, c, channels: tl.constexpr):
    """shift [C] of the channels c, rounded to u's dtype, in fp32."""
    return to_fp32(from_fp32(to_fp32(tl.load(shift + c, mask=c < channels, other=0.0)), u.dtype.element_ty))


@triton.jit
def _passes(v, bit: tl.constexpr):
    return tl.where(v <= 0.0, 0, bit)


@triton.jit
def _taken(maximum, code, v, bit: tl.constexpr):
    take = (maximum < v) | (v != v)
    return tl.where(take, v, maximum), tl.where(take, bit, code)


@triton.jit
def _window(a, b, c, d, complete):
    """Maximum and mask byte of windows a b over c d, as PyTorch scans: the first of equals, the last NaN."""
    maximum, code = _taken(a, 0x10, b, 0x20)
    maximum, code = _taken(maximum, code, c, 0x40)
    maximum, code = _taken(maximum, code, d, 0x80)
    passes = _passes(a, 1) | _passes(b, 2) | _passes(c, 4) | _passes(d, 8)
    return maximum, (passes | tl.where(complete, code & (passes << 4), 0)).to(tl.uint8)


@triton.jit
def _gradient(byte, j: tl.constexpr, gp, gm):
    """d(u) of element j of a window: gp where it passes, and gm where it is the maximum."""
    code = byte.to(tl.int32)
    return tl.where((code & (1 << j)) != 0, gp + tl.where((code & (0x10 << j)) != 0, gm, 0.0), 0.0)


@triton.jit
def _packed(passes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """[ROWS, 8 * BYTES] of 0 and 1 -> [ROWS, BYTES], least significant bit first."""
    eights = tl.reshape(passes, [ROWS, BYTES, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _unpacked(bytes_, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """[ROWS, BYTES] -> [ROWS, 8 * BYTES] of 0 and 1."""
    eights = tl.broadcast_to(bytes_.to(tl.int32)[:, :, None], [ROWS, BYTES, 8])
    return tl.reshape((eights >> tl.arange(0, 8)[None, None, :]) & 1, [ROWS, BYTES * 8])


@triton.jit
def _index(i, WIDE: tl.constexpr):
    return i.to(tl.int64) if WIDE else i


# --- NHWC ---------------------------------------------------------------------------------------------------------------
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
    HH: tl.constexpr = (H + 1) // 2
    WW: tl.constexpr = (W + 1) // 2
    ALL: tl.constexpr = HH * WW if MAX_POOL else H * W
    BYTES: tl.constexpr = C if MAX_POOL else (C + 7) // 8  # of the mask, a window or pixel
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    pid = tl.program_id(0)
    block = pid % BLOCKS
    part = pid // BLOCKS % PARTS
    image = (pid // BLOCKS // PARTS).to(tl.int64)
    c = block * COLS + tl.arange(0, COLS)
    in_c = (c < C)[None, :]
    column = _index(c, WIDE)[None, :] * SC
    u += image * SB
    s = None
    if shift is not None:
        s = _on_grid_of(u, shift, c, C)[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        in_part = (i < ALL)[:, None]
        if MAX_POOL:
            # Four elements of each window
            h = i // WW
            w = i % WW
            corner = u + (_index(2 * h, WIDE) * SH + _index(2 * w, WIDE) * SW)[:, None] + column
            right = in_part & (2 * w + 1 < W)[:, None] if W % 2 else in_part
            below = in_part & (2 * h + 1 < H)[:, None] if H % 2 else in_part
            complete = right & below
            v0 = _rectified(tl.load(corner, mask=in_part & in_c, other=0.0), s, in_part & in_c)
            v1 = _rectified(tl.load(corner + SW, mask=right & in_c, other=0.0), s, right & in_c)
            v2 = _rectified(tl.load(corner + SH, mask=below & in_c, other=0.0), s, below & in_c)
            v3 = _rectified(tl.load(corner + (SH + SW), mask=complete & in_c, other=0.0), s, complete & in_c)
            # Maximum, mask, sum
            maximum, byte = _window(v0, v1, v2, v3, complete)
            at = image * ((H // 2) * (W // 2) * C) + _index(h * (W // 2) + w, WIDE)[:, None] * C + c[None, :]
            tl.store(m + at, from_fp32(maximum, m.dtype.element_ty), mask=complete & in_c)
            if mask is not None:
                tl.store(mask + image * (ALL * BYTES) + _index(i, WIDE)[:, None] * BYTES + c[None, :], byte, mask=in_part & in_c)
            v = (v0 + v1) + (v2 + v3)
        else:
            at = u + (_index(i // W, WIDE) * SH + _index(i % W, WIDE) * SW)[:, None] + column
            v = _rectified(tl.load(at, mask=in_part & in_c, other=0.0), s, in_part & in_c)
            if mask is not None:
                q = block * (COLS // 8) + tl.arange(0, COLS // 8)
                found = _packed(_passes(v, 1), ROWS, COLS // 8)
                tl.store(mask + image * (ALL * BYTES) + _index(i, WIDE)[:, None] * BYTES + q[None, :], found, mask=in_part & (q < BYTES)[None, :])
        total, lost = add_exactly(total, lost, v)

    # The mean; of several parts the last to arrive adds them all, in order
    sums = sum_of_rows(total)
    if PARTS == 1:
        tl.store(p + image * C + c, tl.div_rn(sums, H * W * 1.0), mask=c < C)
    else:
        partial += image * (PARTS * C) + c
        tl.store(partial + part * C, sums, mask=c < C)
        tl.debug_barrier()
        counter = arrivals + image * BLOCKS + block
        if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            tl.debug_barrier()
            whole = tl.zeros([COLS], tl.float32)
            missing = tl.zeros([COLS], tl.float32)
            for r in range(PARTS):
                whole, missing = add_exactly(whole, missing, tl.load(partial + r * C, mask=c < C, other=0.0, cache_modifier=".cg"))
            tl.store(p + image * C + c, tl.div_rn(whole, H * W * 1.0), mask=c < C)
            tl.atomic_xchg(counter, 0)


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
    HH: tl.constexpr = (H + 1) // 2
    WW: tl.constexpr = (W + 1) // 2
    ALL: tl.constexpr = HH * WW if MAX_POOL else H * W
    BYTES: tl.constexpr = C if MAX_POOL else (C + 7) // 8
    BLOCKS: tl.constexpr = (C + COLS - 1) // COLS
    pid = tl.program_id(0)
    block = pid % BLOCKS
    part = pid // BLOCKS % PARTS
    image = (pid // BLOCKS // PARTS).to(tl.int64)
    c = block * COLS + tl.arange(0, COLS)
    in_c = (c < C)[None, :]
    du += image * (H * W * C)
    mask += image * (ALL * BYTES)
    gp = tl.zeros([COLS], tl.float32)
    if dp is not None:
        gp = tl.div_rn(tl.load(dp + image * PB + c * PC, mask=c < C, other=0.0), H * W * 1.0)
    gp = gp[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, PART, ROWS):
        i = part * PART + first + tl.arange(0, ROWS)
        in_part = (i < ALL)[:, None]
        if MAX_POOL:
            h = i // WW
            w = i % WW
            right = in_part & (2 * w + 1 < W)[:, None] if W % 2 else in_part
            below = in_part & (2 * h + 1 < H)[:, None] if H % 2 else in_part
            complete = right & below
            byte = tl.load(mask + _index(i, WIDE)[:, None] * BYTES + c[None, :], mask=in_part & in_c, other=0)
            gm = tl.zeros([ROWS, COLS], tl.float32)
            if dm is not None:
                at = dm + image * SB + (_index(h, WIDE) * SH + _index(w, WIDE) * SW)[:, None] + _index(c, WIDE)[None, :] * SC
                gm = to_fp32(tl.load(at, mask=complete & in_c, other=0.0))
            d0 = _gradient(byte, 0, gp, gm)
            d1 = _gradient(byte, 1, gp, gm)
            d2 = _gradient(byte, 2, gp, gm)
            d3 = _gradient(byte, 3, gp, gm)
            at = du + _index(2 * h * W + 2 * w, WIDE)[:, None] * C + c[None, :]
            tl.store(at, from_fp32(d0, du.dtype.element_ty), mask=in_part & in_c)
            tl.store(at + C, from_fp32(d1, du.dtype.element_ty), mask=right & in_c)
            tl.store(at + W * C, from_fp32(d2, du.dtype.element_ty), mask=below & in_c)
            tl.store(at + (W + 1) * C, from_fp32(d3, du.dtype.element_ty), mask=complete & in_c)
            d = (d0 + d1) + (d2 + d3)
        else:
            q = block * (COLS // 8) + tl.arange(0, COLS // 8)
            found = tl.load(mask + _index(i, WIDE)[:, None] * BYTES + q[None, :], mask=in_part & (q < BYTES)[None, :], other=0)
            d = tl.where(_unpacked(found, ROWS, COLS // 8) != 0, gp, 0.0)
            tl.store(du + _index(i, WIDE)[:, None] * C + c[None, :], from_fp32(d, du.dtype.element_ty), mask=in_part & in_c)
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + (image * PARTS + part) * C + c, sum_of_rows(total), mask=c < C)


# --- NCHW and any other strides -----------------------------------------------------------------------------------------
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
    HH: tl.constexpr = (H + 1) // 2
    WW: tl.constexpr = (W + 1) // 2
    ALL: tl.constexpr = HH * WW if MAX_POOL else H * W
    BYTES: tl.constexpr = ALL if MAX_POOL else (ALL + 7) // 8  # of the mask, a plane
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    image = (pid // BLOCKS).to(tl.int64)
    c = pid % BLOCKS * ROWS + tl.arange(0, ROWS)
    in_c = (c < C)[:, None]
    plane = (image * C + c)[:, None]
    u += image * SB
    row = _index(c, WIDE)[:, None] * SC
    s = None
    if shift is not None:
        s = _on_grid_of(u, shift, c, C)[:, None]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, ALL, COLS):
        i = first + tl.arange(0, COLS)
        if MAX_POOL:
            # Both rows of the windows, element by element: memory runs along them
            e = 2 * first + tl.arange(0, 2 * COLS)
            h = e // (2 * WW)
            w = e % (2 * WW)
            upper = in_c & ((e < 2 * ALL) & (w < W))[None, :]
            lower = upper & (2 * h + 1 < H)[None, :] if H % 2 else upper
            at = u + row + (_index(2 * h, WIDE) * SH + _index(w, WIDE) * SW)[None, :]
            above = _rectified(tl.load(at, mask=upper, other=0.0), s, upper)
            beneath = _rectified(tl.load(at + SH, mask=lower, other=0.0), s, lower)
            # Maximum, mask, sum
            v0, v1 = tl.split(tl.reshape(above, [ROWS, COLS, 2]))
            v2, v3 = tl.split(tl.reshape(beneath, [ROWS, COLS, 2]))
            ih = i // WW
            iw = i % WW
            complete = in_c & ((i < ALL) & (2 * iw + 1 < W) & (2 * ih + 1 < H))[None, :]
            maximum, byte = _window(v0, v1, v2, v3, complete)
            place = i if H % 2 == 0 and W % 2 == 0 else ih * (W // 2) + iw
            tl.store(m + plane * ((H // 2) * (W // 2)) + place[None, :], from_fp32(maximum, m.dtype.element_ty), mask=complete)
            if mask is not None:
                tl.store(mask + plane * BYTES + i[None, :], byte, mask=in_c & (i < ALL)[None, :])
            v = (v0 + v1) + (v2 + v3)
        else:
            inside = in_c & (i < ALL)[None, :]
            if SH == W * SW or H == 1:
                at = u + row + (_index(i, WIDE) * SW)[None, :]
            else:
                at = u + row + (_index(i // W, WIDE) * SH + _index(i % W, WIDE) * SW)[None, :]
            v = _rectified(tl.load(at, mask=inside, other=0.0), s, inside)
            if mask is not None:
                q = first // 8 + tl.arange(0, COLS // 8)
                tl.store(mask + plane * BYTES + q[None, :], _packed(_passes(v, 1), ROWS, COLS // 8), mask=in_c & (q < BYTES)[None, :])
        total, lost = add_exactly(total, lost, v)
    tl.store(p + image * C + c, tl.div_rn(tl.sum(total, axis=1), H * W * 1.0), mask=c < C)


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
    HH: tl.constexpr = (H + 1) // 2
    WW: tl.constexpr = (W + 1) // 2
    ALL: tl.constexpr = HH * WW if MAX_POOL else H * W
    BYTES: tl.constexpr = ALL if MAX_POOL else (ALL + 7) // 8
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    image = (pid // BLOCKS).to(tl.int64)
    c = pid % BLOCKS * ROWS + tl.arange(0, ROWS)
    in_c = (c < C)[:, None]
    plane = (image * C + c)[:, None]
    gp = tl.zeros([ROWS], tl.float32)
    if dp is not None:
        gp = tl.div_rn(tl.load(dp + image * PB + c * PC, mask=c < C, other=0.0), H * W * 1.0)
    gp = gp[:, None]
    total = tl.zeros([ROWS, COLS], tl.float32)
    lost = tl.zeros([ROWS, COLS], tl.float32)

    for first in range(0, ALL, COLS):
        i = first + tl.arange(0, COLS)
        if MAX_POOL:
            ih = i // WW
            iw = i % WW
            byte = tl.load(mask + plane * BYTES + i[None, :], mask=in_c & (i < ALL)[None, :], other=0)
            gm = tl.zeros([ROWS, COLS], tl.float32)
            if dm is not None:
                complete = in_c & ((i < ALL) & (2 * iw + 1 < W) & (2 * ih + 1 < H))[None, :]
                at = dm + image * SB + _index(c, WIDE)[:, None] * SC + (_index(ih, WIDE) * SH + _index(iw, WIDE) * SW)[None, :]
                gm = to_fp32(tl.load(at, mask=complete, other=0.0))
            d0 = _gradient(byte, 0, gp, gm)
            d1 = _gradient(byte, 1, gp, gm)
            d2 = _gradient(byte, 2, gp, gm)
            d3 = _gradient(byte, 3, gp, gm)
            # Both rows of the windows, element by element
            e = 2 * first + tl.arange(0, 2 * COLS)
            h = e // (2 * WW)
            w = e % (2 * WW)
            upper = in_c & ((e < 2 * ALL) & (w < W))[None, :]
            lower = upper & (2 * h + 1 < H)[None, :] if H % 2 else upper
            at = du + plane * (H * W) + (2 * h * W + w)[None, :]
            tl.store(at, from_fp32(tl.interleave(d0, d1), du.dtype.element_ty), mask=upper)
            tl.store(at + W, from_fp32(tl.interleave(d2, d3), du.dtype.element_ty), mask=lower)
            d = (d0 + d1) + (d2 + d3)
        else:
            q = first // 8 + tl.arange(0, COLS // 8)
            found = tl.load(mask + plane * BYTES + q[None, :], mask=in_c & (q < BYTES)[None, :], other=0)
            d = tl.where(_unpacked(found, ROWS, COLS // 8) != 0, gp, 0.0)
            tl.store(du + plane * (H * W) + i[None, :], from_fp32(d, du.dtype.element_ty), mask=in_c & (i < ALL)[None, :])
        if dshift is not None:
            total, lost = add_exactly(total, lost, d)
    if dshift is not None:
        tl.store(dshift + image * C + c, tl.sum(total, axis=1), mask=c < C)


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
