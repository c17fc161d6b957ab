"""Means and paired differences over seeds, with 95 % intervals, by SciPy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 9999

Interval = tuple[float, float]
Values = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Summary:
    """Of one number over n seeds: mean, standard deviation (divisor n - 1), smallest, largest; interval of the mean by Student's t, None for n < 2."""

    n: int
    mean: float
    sd: float
    low: float
    high: float
    interval: Interval | None


@dataclass(frozen=True)
class Difference:
    """Of two numbers seed by seed: mean, its interval by Student's t and by the bootstrap (percentiles), None for n < 2."""

    n: int
    mean: float
    t: Interval | None
    bootstrap: Interval | None


def summary(values: Sequence[float]) -> Summary:
    """ValueError for no values."""
    if not len(values):
        raise ValueError("there are no values to summarise")
    x = np.asarray(values, dtype=np.float64)
    sd = float(x.std(ddof=1)) if len(x) > 1 else 0.0
    return Summary(len(x), float(x.mean()), sd, float(x.min()), float(x.max()), _t_interval(x))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """ours - theirs over the seeds that both have; None where they share none."""
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    x = np.asarray([ours[seed] - theirs[seed] for seed in seeds], dtype=np.float64)
    return Difference(len(x), float(x.mean()), _t_interval(x), _bootstrap(x))


def lands_in(values: Sequence[float], before: Sequence[float]) -> Interval | None:
    """Where the mean of new runs, as many as `values`, lies with 95 % probability if they are drawn as `before` was; None for fewer than two before.

    mean(before) +- t s sqrt(1/n + 1/m): Student's prediction interval for a mean of m after n.
    """
    x = np.asarray(before, dtype=np.float64)
    if len(x) < 2 or not len(values):
        return None
    scale = float(x.std(ddof=1)) * np.sqrt(1 / len(x) + 1 / len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(x) - 1)) * scale
    return float(x.mean()) - reach, float(x.mean()) + reach


def _t_interval(x: Values) -> Interval | None:
    if len(x) < 2:
        return None
    if np.ptp(x) == 0:  # no spread: SciPy's is undefined
        return float(x[0]), float(x[0])
    interval = stats.ttest_1samp(x, 0).confidence_interval(CONFIDENCE)
    return float(interval.low), float(interval.high)


def _bootstrap(x: Values) -> Interval | None:
    if len(x) < 2:
        return None
    if np.ptp(x) == 0:
        return float(x[0]), float(x[0])
    rng = np.random.default_rng(0)  # the page has the same figures whenever it is made
    found = stats.bootstrap((x,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=rng).confidence_interval
    return float(found.low), float(found.high)
