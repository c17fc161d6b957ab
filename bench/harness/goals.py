"""Targets of the design and how far a measurement reached them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .stats import median_interval, ratio_interval

Interval = tuple[float, float, float]  # median, low, high


@dataclass(frozen=True)
class Measured:
    """Samples of a case, in seconds a call, by provider, with the kinds, the bytes of limits, bytes kept for backward and kernels a call."""

    samples: Mapping[str, Sequence[float]]
    kinds: Mapping[str, str]
    bytes: int
    limit_bytes: Mapping[str, int]
    saved: Mapping[str, int] = field(default_factory=dict)
    kernels: Mapping[str, int] = field(default_factory=dict)

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
    """`measure` of (measured, provider) must be at least or at most `bound`, and the low end of its interval at least `low`.

    NaN, where nothing was measured, reaches no goal.
    """

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


def costs_at_most(base: str, bound: float, besides: float = 0.0) -> Goal:
    """At most `bound` times the time of `base`, and `besides` seconds."""

    def measure(measured: Measured, provider: str) -> Interval:
        return ratio_interval([t - besides for t in measured.samples[provider]], measured.samples[base])

    return Goal(f"<= {bound:g}x the time of {base}" + f" + {1e6 * besides:g} us" * (besides > 0), "x", measure, bound, at_most=True)


def keeps_less(peer: str, bound: float) -> Goal:
    """At most 1 / `bound` of the bytes that `peer` keeps for backward."""

    def measure(measured: Measured, provider: str) -> Interval:
        if not measured.saved.get(provider) or peer not in measured.saved:
            return float("nan"), float("nan"), float("nan")
        ratio = measured.saved[peer] / measured.saved[provider]
        return ratio, ratio, ratio

    return Goal(f"keeps >= {bound:g}x less than {peer}", "x less", measure, bound)


def no_more_kernels(base: str) -> Goal:
    """At most as many kernels a call as `base`."""

    def measure(measured: Measured, provider: str) -> Interval:
        if not measured.kernels.get(provider) or not measured.kernels.get(base):
            return float("nan"), float("nan"), float("nan")
        ratio = measured.kernels[provider] / measured.kernels[base]
        return ratio, ratio, ratio

    return Goal(f"launches no more kernels than {base}", "x", measure, 1.0, at_most=True)


def call_time(bound: float) -> Goal:
    """At most `bound` microseconds a call."""

    def measure(measured: Measured, provider: str) -> Interval:
        return median_interval([1e6 * t for t in measured.samples[provider]])

    return Goal(f"<= {bound:g} us", "us", measure, bound, at_most=True)


def gpu_head(pixels: int, layout: str, batch: int) -> list[Goal]:
    """Of the head's forward pass in bf16 on an H200-class GPU; ratios against providers in replayed graphs, shares of the bytes a second of a device copy."""
    chosen = GPU_HEAD.get((pixels, batch))
    if chosen is None:
        return []
    eager, compiled, last = chosen
    return [faster_than("eager", eager[layout]), faster_than("compiled", compiled), last]


GPU_HEAD: dict[tuple[int, int], tuple[dict[str, float], float, Goal]] = {
    # (pixels, batch): over eager, over torch.compile, and a time or a share
    (224, 1): ({"nchw": 5, "channels_last": 9}, 4, call_time(8.0)),
    (224, 8): ({"nchw": 3, "channels_last": 4.5}, 2.3, share_of("copy", 0.65)),
    (224, 32): ({"nchw": 1.7, "channels_last": 2.1}, 1.35, share_of("copy", 0.86)),
    (224, 128): ({"nchw": 1.3, "channels_last": 1.3}, 1.12, share_of("copy", 0.93)),
    (224, 256): ({"nchw": 1.2, "channels_last": 1.2}, 1.08, share_of("copy", 0.95)),
    (32, 128): ({"nchw": 5, "channels_last": 5}, 3.5, call_time(8.0)),
    (32, 512): ({"nchw": 2.7, "channels_last": 2.7}, 2, share_of("copy", 0.70)),
    (32, 2048): ({"nchw": 1.7, "channels_last": 1.7}, 1.3, share_of("copy", 0.88)),
}

GPU_HEAD_TRAINING = [faster_than("eager", 3), faster_than("compiled", 1.6)]
"""Of the head's forward and backward pass, 224 pixels, B=32, bf16."""

GPU_TAP: dict[tuple[str, str], list[Goal]] = {
    # (pass, layout), bf16, B >= 32, with the convolution's bias
    ("forward keeping masks", "channels_last"): [faster_than("eager", 6), faster_than("compiled", 2.6), share_of("copy", 0.90)],
    ("backward", "channels_last"): [
        faster_than("eager", 7),
        faster_than("compiled", 6),
        share_of("copy", 0.88),
        keeps_less("eager", 14),
        keeps_less("compiled", 4.5),
    ],
    ("forward keeping masks", "nchw"): [faster_than("eager", 4), faster_than("compiled", 2), share_of("copy", 0.82)],
    ("backward", "nchw"): [faster_than("eager", 5), faster_than("compiled", 4), share_of("copy", 0.82)],
}


GPU_TWIN: dict[str, list[Goal]] = {
    "interflow_head": [faster_than("ours", 0.85), faster_than("compiled", 1.05)],
    "forward keeping masks": [faster_than("ours", 0.95), faster_than("compiled", 2.4)],
    "backward": [faster_than("ours", 0.95), faster_than("compiled", 5)],
}
"""Of the operators in Triton, bf16, B >= 32: the head's forward pass, and the tap's passes."""


def gpu_network(model: str, direction: str, pixels: int, batch: int, compiled: bool, bare: str | None = None) -> list[Goal]:
    """Of VGG-16 with Interflow fused in bf16, channels_last, beside the plain network and beside `bare`, the same fused stages without branches.

    compiled: or in a replayed graph.
    """
    if model != "vgg16":
        return []
    if pixels == 32:  # bound by launches at B=128: eager against eager, and both in a graph
        both = [costs_at_most("plain", 1.0)] if compiled else [costs_at_most("plain", 0.90), no_more_kernels("plain")]
        return both if batch == 128 else []
    training = direction == "training step"
    bound = (0.90 if compiled else 0.85) if training else (0.96 if compiled else 0.80)
    chosen = [costs_at_most("plain", bound)] if batch >= 32 or not training else []
    return [*chosen, costs_at_most(bare, 1.005, 0.0 if training else 6e-6)] if bare and batch >= 32 else chosen
