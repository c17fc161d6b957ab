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
def _product_in_parts(a, b):
    """a [M, K] in fp32 times b [K, N] in fp32, bf16 or fp16, on bf16 matrix units: what lies below the largest parts' product, and that product.

    A number of fp32 is three of bf16, one of fp16 two, one of bf16 one: a = a0 + a1 + a2, b likewise. Of the nine products three are
    below fp32's last bit. An infinity stands in a0 or b0 alone and meets only the other's largest part, NaN likewise.
    """
    a0, rest = _part(a)
    a1, rest = _part(rest)
    a2 = from_fp32(rest, tl.bfloat16)
    if b.dtype == tl.bfloat16:
        b_finite = from_fp32(_finite(to_fp32(b)), tl.bfloat16)
        small = _mma(a2, b_finite) + _mma(a1, b_finite)
        large = _mma(a0, b)
    else:
        b0, rest = _part(to_fp32(b))
        b1 = from_fp32(rest, tl.bfloat16)
        a0_finite = from_fp32(_finite(to_fp32(a0)), tl.bfloat16)
        b0_finite = from_fp32(_finite(to_fp32(b0)), tl.bfloat16)
        small = _mma(a1, b1) + _mma(a2, b0_finite)
        if b.dtype == tl.float32:
            b2 = from_fp32(rest - to_fp32(b1), tl.bfloat16)
            small += _mma(a0_finite, b2)
        small += _mma(a1, b0_finite) + _mma(a0_finite, b1)
        large = _mma(a0, b0)
    return small, large


@triton.jit
def add_product(total, lost, a, b, SPLIT: tl.constexpr):
    """total + a b, and the sum of what the additions lost (Fast2Sum), for `completed`. a b as it is, or on bf16 matrix units (SPLIT).

    Matrix units cut off where they add, always towards zero: the product of the largest parts, two of 8 bits each, begins at zero there,
    so that little is cut off, and is added here, rounded. Written with differences, as Triton has the units add what stands in `a b + c`.
    """
    if SPLIT:
        small, large = _product_in_parts(a, b)
        negative = small * -1.0 - large
    else:
        negative = tl.dot(a * -1.0, to_fp32(b), input_precision="ieee")
    new = total - negative
    return new, lost + ((total - new) - negative)


@triton.jit
def completed(total, lost):
    """The sum of products with what its additions lost; where the sum is no finite number nothing is known of that."""
    return total + _finite(lost)


@triton.jit
def unknown(n, positive):
    """n, hidden from the compiler: a loop to a known bound is unrolled, and all its loads held in registers at once."""
    return tl.where(positive > 0, n, 0)


# --- sums over a tile ----------------------------------------------------------------------------------------------------
# In pairs, as written here: of a sum over more than two, tl.sum chooses the order by the threads that hold the numbers, and so by the
# strides and the alignment of what was loaded. Adding equal numbers in pairs is exact, a chain of them rounds each time the same way.
@triton.jit
def sum_to_sixteen_rows(x):
    """x [M, N] -> [16, N], or as it is where it has no more rows. By halves: a tile's rows are spread so that these lie in one thread."""
    for _ in tl.static_range(12):
        if x.shape[0] > 16:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), axis=0)
    return x


@triton.jit
def sum_of_rows(x):
    """x [M, N] -> [N]. The last sixteen rows by neighbours, which lie in one warp."""
    x = sum_to_sixteen_rows(x)
    for _ in tl.static_range(4):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1]]), axis=1)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def sum_of_columns(x):
    """x [M, N] -> [M]. Four neighbours first, which lie in one thread, then halves: a tile's columns are spread so."""
    for _ in tl.static_range(2):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    for _ in tl.static_range(12):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), axis=1)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_of_all(x):
    """x [N], a number."""
    return tl.sum(sum_of_columns(tl.reshape(x, [1, x.shape[0]])), axis=0)
