"""Targets of the design and how far a measurement reached them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .stats import median_interval, ratio_interval

Interval = tuple[float, float, float]  # median, low, high


@dataclass(frozen=True)
class Measured:
    """Samples of a case, in seconds a call, by provider, with the kinds and the bytes of limits."""

    samples: Mapping[str, Sequence[float]]
    kinds: Mapping[str, str]
    bytes: int
    limit_bytes: Mapping[str, int]

    def best_peer(self) -> str | None:
        """The peer with the smallest median."""
        return min((name for name in self.samples if self.kinds[name] == "peer"), key=lambda name: np.median(self.samples[name]), default=None)

    def speed_up(self, provider: str, over: str) -> Interval:
        """time of `over` / time of `provider`, paired."""
        return ratio_interval(self.samples[over], self.samples[provider])

    def share(self, provider: str, limit: str) -> Interval:
        """Bytes a second of `provider` / those of `limit`."""
        factor = self.bytes / self.limit_bytes[limit]
        median, low, high = self.speed_up(provider, limit)
        return median * factor, low * factor, high * factor


@dataclass(frozen=True)
class Goal:
    """`measure` of (measured, provider) must be at least or at most `bound`, and the low end of its interval at least `low`."""

    text: str
    unit: str
    measure: Callable[[Measured, str], Interval]
    bound: float
    at_most: bool = False
    low: float | None = None

    def judge(self, measured: Measured, provider: str) -> dict[str, Any]:
        """As the results keep it: text, value, low, high, unit, reached."""
        value, low, high = self.measure(measured, provider)
        reached = value <= self.bound if self.at_most else value >= self.bound
        if self.low is not None:
            reached = reached and low >= self.low
        return {"text": self.text, "value": value, "low": low, "high": high, "unit": self.unit, "reached": bool(reached)}


def faster_than_peers(bound: float) -> Goal:
    """At least `bound` times as fast as the best peer."""

    def measure(measured: Measured, provider: str) -> Interval:
        best = measured.best_peer()
        assert best is not None
        return measured.speed_up(provider, best)

    return Goal(f">= {bound:g}x the best peer", "x", measure, bound)


def faster_than(peer: str, bound: float, low: float | None = None) -> Goal:
    """At least `bound` times as fast as one provider; `low` bounds the interval's lower end."""
    text = f">= {bound:g}x {peer}" + ("" if low is None else f", interval from {low:g}")
    return Goal(text, "x", lambda measured, provider: measured.speed_up(provider, peer), bound, low=low)


def share_of(limit: str, bound: float) -> Goal:
    """At least `bound` of the limit's bytes a second."""
    return Goal(f">= {bound:g} of {limit}", f"of {limit}", lambda measured, provider: measured.share(provider, limit), bound)


def adds_less(peer: str, base: str, bound: float) -> Goal:
    """What `peer` adds to `base` is at least `bound` times what ours adds: (peer - base) / (ours - base), by paired differences; the interval is the peer's."""

    def measure(measured: Measured, provider: str) -> Interval:
        t = {name: np.asarray(samples) for name, samples in measured.samples.items()}
        ours = max(float(np.median(t[provider] - t[base])), 1e-9)
        theirs, low, high = median_interval(list(t[peer] - t[base]))
        return theirs / ours, low / ours, high / ours

    return Goal(f"adds >= {bound:g}x less than {peer}", "x less", measure, bound)


def host_time(bound: float) -> Goal:
    """At most `bound` microseconds a call."""

    def measure(measured: Measured, provider: str) -> Interval:
        return median_interval([1e6 * t for t in measured.samples[provider]])

    return Goal(f"<= {bound:g} us", "us", measure, bound, at_most=True)
