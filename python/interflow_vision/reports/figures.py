"""The pictures of a report, each as a PNG in a data URL: curves, heat maps, calibration, mistakes."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .curves import Log
from .evaluation import BINS, Evaluation, Mistake

SIZE = (5.6, 3.5)
"""Inches of a panel; two stand side by side on a wide screen, one on a narrow one."""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _encoded(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    _pyplot().close(figure)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def lines(curves: Mapping[str, Mapping[int, float]], unit: str, percent: bool = False, log_scale: bool = False) -> str:
    """One line for each curve: epoch -> value."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure, axis = _pyplot().subplots(figsize=SIZE, layout="constrained")
    for number, (label, values) in enumerate(curves.items()):
        style = ("-", "--", ":")[number // 10 % 3]  # matplotlib has ten colours
        epochs = sorted(values)
        axis.plot([epoch + 1 for epoch in epochs], [values[epoch] for epoch in epochs], style, marker="o", markersize=3, label=label)
    axis.set_xlabel("epoch")
    axis.set_ylabel(unit)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if max(map(len, curves.values()), default=0) < 2:  # else one epoch gets ticks of fractions
        axis.margins(x=1)
    axis.grid(alpha=0.3)
    if log_scale:
        axis.set_yscale("log")
    if percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=None))
    axis.legend(frameon=False, fontsize="small")
    return _encoded(figure)


def of_runs(logs: Mapping[str, Log], keys: Mapping[str, str]) -> dict[str, dict[int, float]]:
    """Curves of several runs: title -> metric becomes "run, title" -> values, without the title where there is one."""
    found = {}
    for run, log in logs.items():
        for title, key in keys.items():
            if key in log:
                found[f"{run}, {title}" if title else run] = log[key]
    return found


def heat_map(values: Tensor, rows: Sequence[str], columns: Sequence[str], unit: str, percent: bool = False) -> str:
    """[R, C] as colours, with numbers where they can be read."""
    array = values.double().numpy()
    height, width = array.shape
    figure, axis = _pyplot().subplots(figsize=(max(SIZE[0], min(11.0, 1.6 + 0.55 * width)), max(2.2, min(9.0, 1.2 + 0.42 * height))), layout="constrained")
    image = axis.imshow(array, aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=axis, label=unit, format=(lambda x, _: f"{100 * x:.0f}") if percent else None)
    for names, ticks, turn in ((rows, axis.set_yticks, 0), (columns, axis.set_xticks, 60)):
        places = np.unique(np.linspace(0, len(names) - 1, min(len(names), 25)).round().astype(int))
        ticks(places, [names[i] for i in places], rotation=turn, fontsize="small", **({"ha": "right", "rotation_mode": "anchor"} if turn else {}))
    if height * width <= 150:
        for (i, j), value in np.ndenumerate(array):
            text = "" if np.isnan(value) else f"{100 * value:.0f}" if percent else f"{value:.0f}" if value == round(value) else f"{value:.2f}"
            dark = value < np.nanmin(array) + 0.6 * (np.nanmax(array) - np.nanmin(array))
            axis.text(j, i, text, ha="center", va="center", fontsize="small", color="white" if dark else "black")
    return _encoded(figure)


def reliability(found: Evaluation) -> str:
    """Accuracy by confidence, beside the line of a network that knows how sure it may be."""
    counts, confidence, good = found.calibration.numpy()
    full = counts > 0
    figure, axis = _pyplot().subplots(figsize=SIZE, layout="constrained")
    axis.bar((np.arange(BINS)[full] + 0.5) / BINS, (good[full] / counts[full]), width=0.9 / BINS, alpha=0.7, label="right answers")
    axis.plot(confidence[full] / counts[full], confidence[full] / counts[full], "k.", label="mean confidence")
    axis.plot([0, 1], [0, 1], "k--", linewidth=0.8)
    axis.set(xlabel="probability of the answer", ylabel="part that is right", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize="small", loc="upper left")
    return _encoded(figure)


def mistakes(found: Sequence[Mistake], names: Sequence[str]) -> list[tuple[str, str]]:
    """For each a picture and its caption."""
    return [(picture(each.image), f"{names[each.answer]} ({each.confidence:.0%}), is {names[each.target]}") for each in found]


def picture(image: Tensor) -> str:
    """[C, H, W] in [0, 1] as a PNG in a data URL."""
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
