"""How NVIDIA's matrix units add: an emulation in NumPy, for the tests that run without a GPU.

d = a b + c of bf16 numbers into fp32. The products of 16 columns (Hopper) and c are exact, are cut off, towards zero, below the 24 bits of the
largest exponent among them and two bits more, are added exactly, and the sum is cut off to fp32. 16 columns follow each other.
The model: Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores", arXiv 2512.07004. Beside an H200's own results it has their bits
(tests/test_matrix_units.py).
"""

import numpy as np

COLUMNS, EXTRA_BITS = 16, 2
NOTHING = -1000  # the exponent of 0


def of_bf16(x: np.ndarray) -> bool:
    """Whether these numbers of fp32 are bf16's, as parts are."""
    return x.dtype == np.float32 and not (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any()


def _exponents(x: np.ndarray) -> np.ndarray:
    return np.where(x == 0, NOTHING, np.frexp(x)[1] - 1)


def multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a [M, K] b [K, N] + c [M, N], all fp32, a and b of bf16 numbers. Where infinities or NaN take part, in fp32's own arithmetic."""
    special = not all(np.isfinite(t).all() for t in (a, b, c))
    for first in range(0, a.shape[1], COLUMNS):
        x, y, held = (t.astype(np.float64) for t in (a[:, first : first + COLUMNS], b[first : first + COLUMNS], c))
        if special:
            plain = (x[:, :, None] * y[None]).sum(1) + held
            x, y, held = (np.where(np.isfinite(t), t, 0.0) for t in (x, y, held))
        exponents = _exponents(x)[:, :, None] + _exponents(y)[None]
        largest = np.maximum(exponents.max(1), _exponents(held))
        unit = np.ldexp(1.0, np.maximum(largest - 23 - EXTRA_BITS, -160))
        terms = x[:, :, None] * y[None]
        terms /= unit[:, None]
        total = (np.trunc(terms, out=terms).sum(1) + np.trunc(held / unit)) * unit
        rounded = total.astype(np.float32)
        cut = np.where(np.abs(rounded.astype(np.float64)) > np.abs(total), np.nextafter(rounded, np.float32(0)), rounded)
        c = np.where(np.isfinite(plain), cut, plain.astype(np.float32)) if special else cut
    return c
