"""Interleaved timing behind pytest-benchmark: check first, then all providers of a case in turn, round by round.

pytest-benchmark times one function a test; providers timed minutes apart on a drifting machine cannot be compared. So the
first test of a case measures all its providers interleaved, and each provider's test hands its own samples to
pytest-benchmark through a timer that replays them. JSON, tables and compare work as usual on what was really measured.
"""

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from roofline import quantile, ratio_interval


class ReplayTimer:
    """A clock for pytest-benchmark: the time of the next sample between each pair of calls, real time where none is loaded."""

    def __init__(self) -> None:
        self._ticks: Iterator[float] | None = None

    def load(self, samples: Sequence[float]) -> None:
        def ticks() -> Iterator[float]:
            now = 0.0
            for sample in samples:
                yield now
                now += sample
                yield now

        self._ticks = ticks()

    def __call__(self) -> float:
        if self._ticks is not None:
            tick = next(self._ticks, None)
            if tick is not None:
                return tick
            self._ticks = None
        return time.perf_counter()


REPLAY = ReplayTimer()


@dataclass
class Case:
    """What one row measures. Providers take the index of an input set; peers are those that ours is compared with."""

    name: str
    providers: dict[str, Callable[[int], Any]]
    sets: int
    bytes: int = 0
    target: dict[str, float] = field(default_factory=dict)  # {"peer": ratio, "read": share}
    check: Callable[[], None] | None = None
    seconds: float = 12.0
    samples: dict[str, list[float]] = field(default_factory=dict)


def refuse_wrong(name: str, actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """The gate: raises AssertionError unless a provider's result is within `tolerance` of the largest expected value."""
    error = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    assert error <= tolerance, f"{name} is wrong by {error:.1e} of the largest value, allowed {tolerance:.1e}: not timed"


def measure(case: Case) -> dict[str, list[float]]:
    """Seconds a call, one sample for each provider and round; providers take turns, input sets rotate."""
    if case.samples:
        return case.samples
    if case.check is not None:
        case.check()
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    for provider in case.providers.values():
        for i in range(case.sets):
            provider(i)
    names = list(case.providers)
    start, rounds = time.perf_counter(), 0
    while rounds < 12 or (time.perf_counter() - start < case.seconds and rounds < 400):
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            before = time.perf_counter()
            case.providers[name](rounds % case.sets)
            samples[name].append(time.perf_counter() - before)
        rounds += 1
    case.samples = samples
    return samples


def summary(case: Case, provider: str) -> dict[str, Any]:
    """extra_info of one provider: quantiles, throughput, ratio to the peers and share of the read limit with intervals."""
    samples = measure(case)
    mine = samples[provider]
    info: dict[str, Any] = {
        "case": case.name,
        "provider": provider,
        "rounds": len(mine),
        **{f"p{q}_us": round(quantile(mine, q / 100) * 1e6, 2) for q in (20, 50, 80)},
        "target": case.target,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }
    if case.bytes:
        info["bytes"] = case.bytes
        info["gb_per_s"] = round(case.bytes / statistics.median(mine) / 1e9, 2)
    peers = [name for name in ("eager", "compiled") if name in samples]
    if peers and provider not in peers:
        best = min(peers, key=lambda name: statistics.median(samples[name]))
        info["peer"] = best
        info["peer_ratio"] = [round(v, 3) for v in ratio_interval(samples[best], mine)]
    if "read" in samples and provider != "read":
        info["read_share"] = [round(v, 3) for v in ratio_interval(samples["read"], mine)]
    return info


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def record(benchmark: Any, case: Case, provider: str) -> dict[str, Any]:
    """Hands the provider's samples of a measured case to pytest-benchmark."""
    info = summary(case, provider)
    benchmark.group = case.name
    benchmark.extra_info.update(info)
    REPLAY.load(case.samples[provider])
    benchmark.pedantic(lambda: None, rounds=len(case.samples[provider]), iterations=1)
    return info
