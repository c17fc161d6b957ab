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


@triton.jit
def _finite(x):
    """x where it is finite, 0 elsewhere."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def _part(x):
    """x rounded to bf16, and the rest (0 beside an infinity or NaN)."""
    high = from_fp32(x, tl.bfloat16)
    return high, _finite(x - to_fp32(high))


@triton.jit
def _mma(a, b):
    """a [M, K] b [K, N] in bf16 -> their product in fp32."""
    if INTERPRETED:  # whose own product of bf16 multiplies bit patterns
        return tl.dot(to_fp32(a), to_fp32(b), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def product(a, b, SPLIT: tl.constexpr):
    """a [M, K] in fp32 times b [K, N] in fp32, bf16 or fp16, with the error of fp32: as it is, or on bf16 matrix units (SPLIT).

    In parts: a number of fp32 is three of bf16, one of fp16 two, one of bf16 one: a = a0 + a1 + a2, b likewise. Of the nine products three
    are below fp32's last bit. An infinity stands in a0 or b0 alone and meets only the other's largest part, NaN likewise. Small
    products are added first, and nothing is carried over from another call: matrix units cut off where they add.
    """
    if not SPLIT:
        return tl.dot(a, to_fp32(b), input_precision="ieee")
    a0, rest = _part(a)
    a1, rest = _part(rest)
    a2 = from_fp32(rest, tl.bfloat16)
    if b.dtype == tl.bfloat16:
        b_finite = from_fp32(_finite(to_fp32(b)), tl.bfloat16)
        small = _mma(a2, b_finite) + _mma(a1, b_finite)
        return small + _mma(a0, b)
    b0, rest = _part(to_fp32(b))
    b1 = from_fp32(rest, tl.bfloat16)
    a0_finite = from_fp32(_finite(to_fp32(a0)), tl.bfloat16)
    b0_finite = from_fp32(_finite(to_fp32(b0)), tl.bfloat16)
    small = _mma(a1, b1) + _mma(a2, b0_finite)
    if b.dtype == tl.float32:
        b2 = from_fp32(rest - to_fp32(b1), tl.bfloat16)
        small += _mma(a0_finite, b2)
    small += _mma(a1, b0_finite) + _mma(a0_finite, b1)
    return small + _mma(a0, b0)


@triton.jit
def unknown(n, positive):
    """n, hidden from the compiler: a loop to a known bound is unrolled, and all its loads held in registers at once."""
    return tl.where(positive > 0, n, 0)


@triton.jit
def sum_of_rows(x):
    """x [M, N] -> [N], by a tree. The interpreter's own sum over rows is a chain, which rounds a long sum of equal numbers each time the same way."""
    if INTERPRETED:
        for _ in tl.static_range(12):
            if x.shape[0] > 1:
                x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), axis=1)
    return tl.sum(x, axis=0)
