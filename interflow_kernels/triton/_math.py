"""Device functions that both operators share: conversions, sums that do not drift. Nothing about one operator."""

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction


@triton.jit
def _probe():
    pass


INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(_probe, JITFunction))
"""Whether TRITON_INTERPRET=1 was set when the kernels were defined."""


@triton.jit
def to_fp32(x):
    """Exactly. The interpreter's own conversion of bf16 loses subnormals."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def from_fp32(x, dtype: tl.constexpr):
    """Rounded to nearest even. The interpreter's own conversion to bf16 cuts off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        kept = tl.where(x == x, rounded, (bits >> 16) | 0x40)
        return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def add_exactly(total, lost, x):
    """total + x, and what the addition lost (Kahan): a long sum of equal numbers would round each time the same way."""
    y = x - lost
    new = total + y
    rest = (new - total) - y
    return new, tl.where(rest == rest, rest, 0.0)  # inf - inf
