"""What the stage end's kernels share, in both layouts and directions.

v = act((u + shift) + residual)    [B, C, H, W]   each step rounded to u's dtype; act is relu, or nothing
p = mean of v over H, W            [B, C]
d = dv + dp / (H * W)              where v passes, else 0; du is d rounded once, dshift = sum of d over B, H, W
"""

import triton
import triton.language as tl

from ..common.maps import index
from ..common.math import from_fp32, to_fp32


@triton.jit
def offsets(i, H: tl.constexpr, W: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, WIDE: tl.constexpr):
    """Of the pixels i of a plane whose rows and columns lie so far apart."""
    return index(i, WIDE) * SW if SH == W * SW or H == 1 else index(i // W, WIDE) * SH + index(i % W, WIDE) * SW


@triton.jit
def ended(u, shift, residual, inside, RELU: tl.constexpr):
    """act((u + shift) + residual) in fp32, rounded to u's dtype at each step; NaN and -0 stay; 0 outside the map. shift: fp32, on u's grid."""
    x = to_fp32(u)
    if shift is not None:
        x = to_fp32(from_fp32(x + shift, u.dtype))
    if residual is not None:
        x = to_fp32(from_fp32(x + to_fp32(residual), u.dtype))
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return tl.where(inside, x, 0.0)


@triton.jit
def gradient(dv, gp, v, inside):
    """d in fp32; 0 outside the map. gp: dp / (H * W), of the tile's shape but for the pixels; of dv and gp one may be None, and v."""
    if dv is None:
        d = tl.where(inside, gp, 0.0)
    else:
        d = to_fp32(dv)
        if gp is not None:
            d = d + gp
        d = tl.where(inside, d, 0.0)
    if v is not None:
        d = tl.where(to_fp32(v) <= 0.0, 0.0, d)
    return d
