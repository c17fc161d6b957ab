"""The arithmetic of samples: quantiles, intervals, comparison of two runs, fitted exponents. Nothing here measures."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def quantile(samples: Sequence[float] | np.ndarray[Any, Any], q: float) -> float:
    """Linear interpolation between order statistics; q in [0, 1]."""
    return float(np.quantile(np.asarray(samples, dtype=float), q))


def order_interval(samples: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Order statistics around the median that hold the true median with at least `level`, for any distribution.

    P(x_(k) <= median <= x_(n+1-k)) = 1 - 2 P(Binomial(n, 1/2) < k). Fewer than 6 samples reach no 95 %: minimum and maximum then.
    """
    ordered, n = sorted(samples), len(samples)
    k, below = 0, 0.0
    while True:
        below += math.comb(n, k) / 2.0**n  # P(Binomial <= k)
        if 2 * below > 1 - level or k + 1 > n // 2:
            break
        k += 1
    k = max(k, 1)
    return ordered[k - 1], ordered[n - k]


def bootstrap_medians(samples: Sequence[float], seed: int = 0, draws: int = DRAWS) -> np.ndarray[Any, Any]:
    """Medians [draws] of resamples made of blocks of n^(1/3) neighbouring rounds, so that slow drift stays in: a circular block bootstrap."""
    values = np.asarray(samples, dtype=float)
    n = len(values)
    block = max(1, round(n ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, n, (draws, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(draws, -1)[:, :n] % n
    return np.median(values[index], axis=1)


def median_interval(samples: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median with its 95 % interval: (median, low, high).

    The interval is the block bootstrap's, but never narrower than the distribution-free one: a dozen rounds resample too tightly.
    """
    medians = bootstrap_medians(samples, seed)
    low, high = order_interval(samples)
    return float(np.median(samples)), min(low, quantile(medians, (1 - LEVEL) / 2)), max(high, quantile(medians, (1 + LEVEL) / 2))


def ratio_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios a/b with its 95 % interval: (median, low, high). a[i] and b[i] ran in one round."""
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a and b must be as many and at least one, got {len(a)} and {len(b)}")
    return median_interval([x / y for x, y in zip(a, b, strict=True)], seed)


def unpaired_ratio_interval(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """median(a) / median(b) of two runs and its 95 % bootstrap interval: (ratio, low, high)."""
    ratios = bootstrap_medians(a, seed) / bootstrap_medians(b, seed + 1)
    return float(np.median(a) / np.median(b)), quantile(ratios, (1 - LEVEL) / 2), quantile(ratios, (1 + LEVEL) / 2)


def rank_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test (normal approximation, ties corrected): do a and b come from one distribution?"""
    m, n = len(a), len(b)
    values = np.concatenate([np.asarray(a, dtype=float), np.asarray(b, dtype=float)])
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    u = float(ranks[:m].sum()) - m * (m + 1) / 2
    total = m + n
    ties = float((counts**3 - counts).sum()) / (total * (total - 1))
    sigma = math.sqrt(m * n / 12 * (total + 1 - ties))
    return 1.0 if sigma == 0 else math.erfc(max(abs(u - m * n / 2) - 0.5, 0) / sigma / math.sqrt(2))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p values: below 0.05 means significant with at most 5 % chance of any false alarm among all cases."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = running
    return adjusted


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """The least-squares slope of log y over log x: e in y ~ x^e."""
    return float(np.polyfit(np.log(np.asarray(x, dtype=float)), np.log(np.asarray(y, dtype=float)), 1)[0])


def crossover(batches: Sequence[int], ratios: Sequence[float]) -> float | None:
    """The batch at which a speed-up by batch falls through 1, interpolated in the logarithm; None where it never does."""
    points = sorted(zip(batches, ratios, strict=True))
    for (b0, r0), (b1, r1) in pairwise(points):
        if r0 >= 1 > r1:
            return float(b0 * (b1 / b0) ** ((r0 - 1) / (r0 - r1)))
    return None
