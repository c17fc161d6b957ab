"""What was measured on a GPU of the rows that the model predicts: read from the committed results of `make gpu`."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "results/nvidia-h200"
LAYOUTS = {True: "channels_last", False: "nchw"}


@dataclass(frozen=True)
class Found:
    """Microseconds, and the share of the copy of the same run or, of a network, its time over the plain one's."""

    microseconds: float
    share: float

    def cell(self, unit: str = "") -> str:
        """As the page shows it."""
        return f"{self.microseconds:.1f} us, {self.share:.2f}" if not unit else f"{self.microseconds:.0f} us, {self.share:.2f}{unit}"


class Measured:
    """The rows of speed.json and headline.json; None for whatever was not measured."""

    def __init__(self, speed: dict[str, Any], headline: dict[str, Any]) -> None:
        self.speed, self.headline = speed, headline

    def _kernel(self, what: str, direction: str, layout: bool, batch: int, name: str) -> Found | None:
        for row in self.speed["rows"]:
            about = (row["what"], row.get("pass"), row.get("layout"), row.get("batch"), row.get("map"))
            if about == (what, direction, LAYOUTS[layout], batch, name):
                return Found(row["us"], row["share"])
        return None

    def head(self, batch: int, nhwc: bool, backward: bool = False) -> Found | None:
        """Of VGG-16's four stages at 224 pixels, K = 1000."""
        return self._kernel("head", "backward" if backward else "forward", nhwc, batch, "four stages")

    def taps(self, batch: int, nhwc: bool, backward: bool) -> Found | None:
        """Of the five boundaries together."""
        return self._kernel("tap", "backward" if backward else "forward", nhwc, batch, "five boundaries")

    def tap(self, batch: int, channels: int, side: int, nhwc: bool, backward: bool) -> Found | None:
        """Of one boundary."""
        return self._kernel("tap", "backward" if backward else "forward", nhwc, batch, f"{channels}x{side}x{side}")

    def network(self, batch: int, training: bool, provider: str = "Interflow fused") -> Found | None:
        """VGG-16 at 224 pixels, bf16, channels_last, eager; beside the plain network."""
        for row in self.headline["rows"]:
            about = (row.get("model"), row.get("pass"), row.get("batch"), row.get("compiled"), row.get("provider"))
            if about == ("vgg16", "training step" if training else "inference", batch, False, provider):
                return Found(row["p50_us"], 1 / row["speed_up"]["plain"][0] if provider != "plain" else 1.0)
        return None

    def rate(self, names: Sequence[str] = ("copy", "copy by a kernel")) -> float:
        """TB/s of the faster copy: the median of those that were measured between the rows."""
        return max(statistics.median([row["gb_per_s"] for row in self.speed["rows"] if row["what"] == name]) for name in names) / 1e3

    def about(self) -> str:
        """Which GPU, with what, when."""
        machine = self.speed["machine"]
        return f"{machine['gpu']}, torch {machine['versions']['torch']}, driver {machine['gpu_driver']}, {self.speed['date'][:10]}"


def committed() -> Measured:
    speed, headline = (json.loads((FOLDER / f"{part}.json").read_text()) for part in ("speed", "headline"))
    return Measured(speed, headline)
