"""What the stage tap's kernels share, in both layouts and directions.

    v = relu(u + shift)        [B, C, H, W]              each step rounded to u's dtype; never written
    m = max_pool2d(v, 2, 2)    [B, C, H/2, W/2]          rounded down
    p = mean of v over H, W    [B, C]
    du = passes * dp / (H * W) + is the maximum * dm     dshift = sum of du over B, H, W

The mask is that of csrc/stage_tap/contract.h, byte for byte.
"""

import triton
import triton.language as tl

from ..common.math import from_fp32, to_fp32


@triton.jit
def rectified(u, shift, inside):
    """relu(u + shift) in fp32, rounded to u's dtype; NaN and -0 stay; 0 outside the map. shift: fp32, on u's grid, or None."""
    x = to_fp32(u)
    if shift is not None:
        x = to_fp32(from_fp32(x + shift, u.dtype))
    return tl.where((x < 0.0) | ~inside, 0.0, x)


@triton.jit
def passes_by(v, bit: tl.constexpr):
    return tl.where(v <= 0.0, 0, bit)


@triton.jit
def _taken(maximum, code, v, bit: tl.constexpr):
    take = (maximum < v) | (v != v)
    return tl.where(take, v, maximum), tl.where(take, bit, code)


@triton.jit
def window(a, b, c, d, complete):
    """Maximum and mask byte of windows a b over c d, as PyTorch scans: the first of equals, the last NaN."""
    maximum, code = _taken(a, 0x10, b, 0x20)
    maximum, code = _taken(maximum, code, c, 0x40)
    maximum, code = _taken(maximum, code, d, 0x80)
    passes = passes_by(a, 1) | passes_by(b, 2) | passes_by(c, 4) | passes_by(d, 8)
    return maximum, (passes | tl.where(complete, code & (passes << 4), 0)).to(tl.uint8)


@triton.jit
def _gradient(byte, j: tl.constexpr, gp, gm):
    """d(u) of element j of a window: gp where it passes, and gm where it is the maximum."""
    code = byte.to(tl.int32)
    return tl.where((code & (1 << j)) != 0, gp + tl.where((code & (0x10 << j)) != 0, gm, 0.0), 0.0)


@triton.jit
def gradients(byte, gp, gm):
    """d(u) of a window's four elements."""
    return _gradient(byte, 0, gp, gm), _gradient(byte, 1, gp, gm), _gradient(byte, 2, gp, gm), _gradient(byte, 3, gp, gm)


@triton.jit
def packed(passes, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """[ROWS, 8 * BYTES] of 0 and 1 -> [ROWS, BYTES], least significant bit first."""
    eights = tl.reshape(passes, [ROWS, BYTES, 8])
    return tl.sum(eights << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def unpacked(bytes_, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """[ROWS, BYTES] -> [ROWS, 8 * BYTES] of 0 and 1."""
    eights = tl.broadcast_to(bytes_.to(tl.int32)[:, :, None], [ROWS, BYTES, 8])
    return tl.reshape((eights >> tl.arange(0, 8)[None, None, :]) & 1, [ROWS, BYTES * 8])


@triton.jit
def windows(i, H: tl.constexpr, W: tl.constexpr):
    """Row and column of the windows i; whether each lies in the map, has a right side, a lower side, both."""
    HH: tl.constexpr = (H + 1) // 2
    WW: tl.constexpr = (W + 1) // 2
    h = i // WW
    w = i % WW
    inside = i < HH * WW
    right = inside & (2 * w + 1 < W) if W % 2 else inside
    below = inside & (2 * h + 1 < H) if H % 2 else inside
    return h, w, inside, right, below, right & below
