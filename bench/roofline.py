"""Bytes and operations of the head, and the statistics of interleaved samples: nothing here measures."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class HeadShape:
    """maps (C, H, W) of each stage, K classes, B images, bytes an element."""

    maps: tuple[tuple[int, int, int], ...]
    classes: int
    batch: int
    element: int

    @property
    def width(self) -> int:
        """D = sum C_i."""
        return sum(c for c, _, _ in self.maps)

    def map_bytes(self) -> int:
        return sum(self.batch * c * h * w * self.element for c, h, w in self.maps)

    def forward_bytes(self) -> int:
        """Every map and W read once, y written once."""
        return self.map_bytes() + self.classes * self.width * self.element + self.batch * self.classes * self.element

    def forward_flops(self) -> int:
        """An addition for each map element, a multiply-add for each of B * K * D."""
        return self.map_bytes() // self.element + 2 * self.batch * self.classes * self.width


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between order statistics; q in [0, 1]."""
    ordered = sorted(samples)
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ratio_interval(a: Sequence[float], b: Sequence[float], draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Median of the paired ratios a/b with its 95 % bootstrap interval: (median, low, high). a[i] and b[i] ran in one round."""
    if len(a) != len(b) or not a:
        raise ValueError(f"a and b must be as many and at least one, got {len(a)} and {len(b)}")
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    generator = random.Random(seed)
    medians = [statistics.median(generator.choices(ratios, k=len(ratios))) for _ in range(draws)]
    return statistics.median(ratios), quantile(medians, 0.025), quantile(medians, 0.975)
