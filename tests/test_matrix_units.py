"""The emulation of NVIDIA's matrix units beside an H200's own results; what the head's products make of them."""

import matrix_units
import numpy as np
import pytest
import torch
from accuracy_cases import exact_products, products


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def parts(x):
    high = bf16(x)
    middle = bf16(x - high)
    return high, middle, bf16(x - high - middle)


def scores(pooled, weight):
    """pooled [B, D] times weight [K, D] in tiles of 32 columns. As the kernels had it on that GPU: the units added the largest parts' product to the rest."""
    z = np.zeros((pooled.shape[0], weight.shape[0]), np.float32)
    for first in range(0, pooled.shape[1], 32):
        (a0, a1, a2), (b0, b1, b2) = (parts(t[:, first : first + 32]) for t in (pooled, weight))
        tile = np.zeros_like(z)
        for a, b in ((a1, b1), (a2, b0), (a0, b2), (a1, b0), (a0, b1), (a0, b0)):
            tile = matrix_units.multiply_add(a, b.T, tile)
        z += tile
    return z


def test_the_bits_of_an_h200():
    """Its branch score of equal images and a weight of equal columns, and its y of the attention "nxn"; torch 2.11, Triton 3.6."""
    torch.manual_seed(0)
    P = products("constant", "nxn", 2, (1040, 70), 6, torch.float32, False)
    z = [scores(p.numpy(), w.numpy()) + b.numpy() for p, w, b in zip(P.pooled, P.weight.split((1040, 70), 1), P.bias, strict=True)]
    assert z[0][0, 2] == np.float32(1817.971923828125) and exact_products(P, "nxn")["branches"][0, 0, 2] == pytest.approx(1817.972825696971, rel=1e-15)
    a = P.attention_weight.numpy().sum(0)
    assert (z[0] * a[0] + z[1] * a[1] + P.attention_bias.numpy().sum())[0, 2] == np.float32(5538.2470703125)


def test_sums_are_cut_off_towards_zero():
    one = np.ones((1, 1), np.float32)
    for sign in (1, -1):
        for bits, kept in ((23, True), (24, False)):
            small = np.full((1, 1), 2.0**-bits, np.float32)
            assert (matrix_units.multiply_add(sign * small, one, sign * one) != sign * one).all() == kept
    four = np.full((1, 4), 2.0**-25, np.float32)  # two bits more than 24 for what is added
    assert matrix_units.multiply_add(four, np.ones((4, 1), np.float32), one)[0, 0] == 1 + 2.0**-23


def test_infinities_and_nan_pass():
    a, b, c = np.float32([[np.inf, 1], [np.nan, 1], [1, 1]]), np.float32([[1], [2]]), np.float32([[0], [0], [-np.inf]])
    assert np.array_equal(matrix_units.multiply_add(a, b, c), [[np.inf], [np.nan], [-np.inf]], equal_nan=True)
