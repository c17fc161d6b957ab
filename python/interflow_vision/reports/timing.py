"""Two ways to do the same, timed in turns on one machine."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles

import torch


@dataclass(frozen=True)
class Timing:
    """Milliseconds: median and the quartiles around it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ms ({self.low:.2f} - {self.high:.2f})"


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Each way once a round, in turns so that whatever else the machine does meets all of them; three rounds to warm up first."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(rounds + 3):
        for name, way in ways.items():
            _wait()
            start = time.perf_counter()
            way()
            _wait()
            if i >= 3:
                seconds[name].append(1e3 * (time.perf_counter() - start))
    return {name: Timing(median(taken), *quantiles(taken, n=4)[::2]) for name, taken in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
