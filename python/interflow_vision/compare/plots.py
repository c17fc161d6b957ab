"""The page's pictures, by matplotlib."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import claims, results, statistics
from .plan import Cell, Study
from .tables import Found, arms_of, places

SIZE = (9.0, 4.2)


def draw(study: Study, found: Found, folder: Path) -> dict[str, str]:
    """Writes the pictures into the folder; file name -> what it shows, of those that there is something for."""
    shown: dict[str, str] = {}
    for data, network in places(found):
        where = f"{study.networks[network]['title']}, {study.data[data]['title']}"
        for kind, make, says in (
            ("differences", _differences, f"Test accuracy less that of {study.arms[study.baseline]['title']}, paired by seed, 95 % by t. {where}."),
            ("gradients", _gradients, f"Gradient norm of every convolution, in the first step and over training, means over seeds. {where}."),
            ("curves", _curves, f"Validation accuracy over the epochs, means over seeds. {where}."),
            ("branches", _branches, f"Test accuracy of each branch alone, means and standard deviations over seeds. {where}."),
        ):
            name = f"{data}-{network}-{kind}.png"
            if make(study, found, arms_of(found, data, network), folder / name):
                shown[name] = says
    for data in dict.fromkeys(cell.data for cell in found):
        if _depth(study, found, data, folder / f"{data}-depth.png"):
            shown[f"{data}-depth.png"] = f"Test accuracy against depth, means and standard deviations over seeds. {study.data[data]['title']}."
    return shown


def _done(found: Found, cell: Cell) -> list[results.Result]:
    return [run for run in found[cell].values() if run["status"] == "done"]


def _figure(columns: int = 1, height: float = SIZE[1]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, columns, figsize=(SIZE[0], height), squeeze=False, layout="constrained")


def _save(figure: Any, path: Path) -> bool:
    from matplotlib import pyplot as plt

    figure.savefig(path, dpi=80, metadata={"Software": None})
    plt.close(figure)
    return True


def _style(number: int) -> dict[str, Any]:
    """Ten colours, then the same dashed."""
    return {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}


def _dress(axis: Any, title: str, x: str, y: str, whole: bool = True) -> None:
    """whole: x counts something."""
    if whole:
        from matplotlib.ticker import MaxNLocator

        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)


def _differences(study: Study, found: Found, cells: Sequence[Cell], path: Path) -> bool:
    base = next((cell for cell in cells if cell.arm == study.baseline), None)
    if base is None:
        return False
    theirs = results.accuracies(found[base])
    points = [(study.arms[cell.arm]["title"], statistics.paired(results.accuracies(found[cell]), theirs)) for cell in cells if cell != base]
    shown = [(title, d) for title, d in points if d is not None]
    if not shown:
        return False
    figure, axes = _figure(height=1.0 + 0.3 * len(shown))
    axis = axes[0, 0]
    for place, (_, d) in enumerate(reversed(shown)):
        if d.t is not None:
            axis.plot([100 * bound for bound in d.t], [place, place], color="C0", linewidth=2)
        axis.plot(100 * d.mean, place, "o", color="C0")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [title for title, _ in reversed(shown)])
    axis.set_ylim(-0.6, len(shown) - 0.4)
    _dress(axis, "", "points", "", whole=False)
    return _save(figure, path)


def _gradients(study: Study, found: Found, cells: Sequence[Cell], path: Path) -> bool:
    figure, axes = _figure(2)
    drawn = False
    for number, cell in enumerate(cells):
        runs = _done(found, cell)
        if not runs:
            continue
        drawn = True
        starts = [run["gradients"]["start"] for run in runs]
        later = [norms for run in runs for norms in run["gradients"]["epochs"]]
        for axis, many in zip(axes[0], (starts, later), strict=True):
            norms = [10 ** (sum(math.log10(max(value, 1e-30)) for value in column) / len(column)) for column in zip(*many, strict=True)]
            axis.semilogy(range(1, len(norms) + 1), norms, label=study.arms[cell.arm]["title"], **_style(number))
    _dress(axes[0, 0], "first step", "convolution, from the image on", "norm of the gradient")
    _dress(axes[0, 1], "last step of each epoch, geometric mean", "convolution, from the image on", "")
    axes[0, 1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path) if drawn else _close(figure)


def _curves(study: Study, found: Found, cells: Sequence[Cell], path: Path) -> bool:
    figure, axes = _figure()
    drawn = False
    for number, cell in enumerate(cells):
        curves = [[100 * epoch["val/accuracy"] for epoch in run["epochs"]] for run in _done(found, cell)]
        if curves:
            drawn = True
            means = [sum(column) / len(column) for column in zip(*curves, strict=True)]
            axes[0, 0].plot(range(1, len(means) + 1), means, label=study.arms[cell.arm]["title"], **_style(number))
    _dress(axes[0, 0], "", "epoch", "validation accuracy, %")
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path) if drawn else _close(figure)


def _branches(study: Study, found: Found, cells: Sequence[Cell], path: Path) -> bool:
    figure, axes = _figure()
    drawn = False
    for number, cell in enumerate(cells):
        each = [branches for branches in map(claims.branch_accuracies, _done(found, cell)) if branches]
        if each:
            drawn = True
            found_of = [statistics.summary([100 * value for value in column]) for column in zip(*each, strict=True)]
            places_of = [i + 1 + 0.02 * number for i in range(len(found_of))]
            axes[0, 0].errorbar(places_of, [s.mean for s in found_of], [s.sd for s in found_of], label=study.arms[cell.arm]["title"], **_style(number))
    _dress(axes[0, 0], "", "branch, from the image on", "test accuracy alone, %")
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path) if drawn else _close(figure)


def _depth(study: Study, found: Found, data: str, path: Path) -> bool:
    networks = sorted((n for d, n in places(found) if d == data and "depth" in study.networks[n]), key=lambda n: study.networks[n]["depth"])
    if len(networks) < 2:
        return False
    figure, axes = _figure()
    for number, arm in enumerate(dict.fromkeys(cell.arm for cell in found if cell.data == data and cell.network in networks)):
        points = []
        for network in networks:
            own = list(results.accuracies(found.get(Cell(data, network, arm), {})).values())
            if own:
                s = statistics.summary([100 * value for value in own])
                points.append((study.networks[network]["depth"], s.mean, s.sd))
        if points:
            axes[0, 0].errorbar(*zip(*points, strict=True), marker="o", markersize=3, label=study.arms[arm]["title"], **_style(number))
    _dress(axes[0, 0], "", "convolutions", "test accuracy, %")
    axes[0, 0].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return _save(figure, path)


def _close(figure: Any) -> bool:
    from matplotlib import pyplot as plt

    plt.close(figure)
    return False
