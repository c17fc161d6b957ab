"""What all charts share: colours, style, axes, and the chart itself as SVG or PNG."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

OURS, PEER, LOST, EVEN, GRID = "#1f5fbf", "#d9730d", "#c0262d", "#777777", "#e3e3e3"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "figure.dpi": 150,
}
COLOURS = {"faster": OURS, "even": EVEN, "slower": LOST}


@dataclass(frozen=True)
class Chart:
    """A picture with what a reader should see in it. `draw` makes the figure."""

    key: str
    title: str
    caption: str
    draw: Callable[[], Figure]

    def svg(self) -> str:
        """The <svg> element alone, with identifiers of its own so that several lie in one page."""
        with plt.rc_context({**STYLE, "svg.hashsalt": self.key}):
            figure = self.draw()
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
            plt.close(figure)
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        for prefix in ('id="', "url(#", 'href="#'):
            svg = svg.replace(prefix, prefix + self.key + "-")
        return svg

    def png(self, path: Path, digest: str) -> None:
        """The picture as a file that carries the digest of the results that it was made from."""
        with plt.rc_context(STYLE):
            figure = self.draw()
            figure.savefig(path, format="png", metadata={"Source": f"results sha256 {digest}", "Software": None})
            plt.close(figure)


def rows_figure(labels: list[str], inches: float) -> tuple[Figure, Any]:
    """A figure narrow enough for a phone: a row for each label, which stands above the row's marks instead of beside them."""
    figure, axes = plt.subplots(figsize=(4.6, 0.9 + inches * len(labels)), layout="constrained")
    for y, label in enumerate(labels):
        axes.annotate(
            label,
            (0, y),
            xycoords=("axes fraction", "data"),
            xytext=(3, inches * 36 - 5),
            textcoords="offset points",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none"},
        )
    axes.set_ylim(-0.6, len(labels) - 0.3)
    axes.set_yticks([])
    axes.grid(visible=False, axis="y")
    return figure, axes


def ratio_axis(axes: Any) -> None:
    """Ratios on a logarithmic axis."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    low, high = min(low, 0.9), high * 1.35  # room for the last figure
    axes.set_xlim(low, high)
    ticks = [t for t in (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def short(case: str) -> str:
    """A case's name for a chart."""
    return (
        case.replace("forward+backward", "fwd+bwd")
        .replace("forward", "fwd")
        .replace("channels_last", "NHWC")
        .replace("nchw", "NCHW")
        .replace("training step", "train")
    )
