"""The linear modes of the head's attention in Triton kernels: A, c, and A times a tile.

y[b,k] = sum_i A_ik z_i[b,k] + c_k      "nxn": A_ik = sum_j M_ji, for all its outputs are summed
"""

import triton
import triton.language as tl

from ..common.math import sum_of_all, to_fp32

HARD: tl.constexpr = tl.constexpr(0)  # also 1xn: y = sum_i w_i z_i (+ c)
NXN: tl.constexpr = tl.constexpr(1)
CLASSWISE: tl.constexpr = tl.constexpr(2)
GATED: tl.constexpr = tl.constexpr(3)
FOLDED: tl.constexpr = tl.constexpr(4)


@triton.jit
def linear_weight(attention_weight, i, k, MODE: tl.constexpr, K: tl.constexpr):
    """A[i, k] of a linear mode other than "nxn", [classes] fp32."""
    # No return inside a branch, here and below: Triton goes on compiling after it, with what is None there, or of shapes that do not fit.
    if MODE == CLASSWISE:
        a = to_fp32(tl.load(attention_weight + i * K + k, mask=k < K, other=0.0))
    elif MODE == FOLDED:
        a = tl.full([k.shape[0]], 1.0, tl.float32)
    else:
        a = tl.zeros([k.shape[0]], tl.float32) + to_fp32(tl.load(attention_weight + i))
    return a


@triton.jit
def _mixed(z, matrix, i, N: tl.constexpr, N2: tl.constexpr):
    """sum_j M_ji z, by the sum of M's column; NaN and infinities as the terms have them.

    A sum that is not finite is taken apart: M may hold infinities, or be finite and its sum too large. An infinite z gives NaN beside a zero
    or weights of both signs.
    """
    j = tl.arange(0, N2)
    column = to_fp32(tl.load(matrix + j * N + i, mask=j < N, other=0.0))
    a = sum_of_all(column)
    lowest = tl.min(tl.where(j < N, column, float("inf")), axis=0)
    highest = tl.max(tl.where(j < N, column, -float("inf")), axis=0)
    of_infinite = tl.where((lowest > 0.0) | (highest < 0.0), a, float("nan"))
    found = z * tl.where(tl.abs(z) == float("inf"), of_infinite, a)
    if a - a != 0.0:
        found = z * to_fp32(tl.load(matrix + i))
        for row in range(1, N):
            found += z * to_fp32(tl.load(matrix + row * N + i))
    return found


@triton.jit
def weighted(z, attention_weight, i, k, MODE: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr, CLASSES_FIRST: tl.constexpr = False):
    """A[i, k] z of a tile whose classes are the last axis, or the first of two."""
    if MODE == NXN:
        found = _mixed(z, attention_weight, i, N, N2)
    else:
        a = linear_weight(attention_weight, i, k, MODE, K)
        if len(z.shape) == 1:
            found = z * a
        elif CLASSES_FIRST:
            found = z * a[:, None]
        else:
            found = z * a[None, :]
    return found


@triton.jit
def linear_offset(attention_bias, k, MODE: tl.constexpr, N: tl.constexpr, N2: tl.constexpr, K: tl.constexpr):
    """c[k] of a linear mode, [classes] fp32."""
    if (MODE == CLASSWISE) or (MODE == FOLDED):
        c = to_fp32(tl.load(attention_bias + k, mask=k < K, other=0.0))
    elif MODE == NXN:
        j = tl.arange(0, N2)
        c = tl.zeros([k.shape[0]], tl.float32) + sum_of_all(to_fp32(tl.load(attention_bias + j, mask=j < N, other=0.0)))
    else:
        c = tl.zeros([k.shape[0]], tl.float32) + to_fp32(tl.load(attention_bias))
    return c
