"""What a run leaves to look at: the test result in words, and a picture of the CSV log."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Log = dict[str, dict[int, float]]
"""Metric -> epoch -> value."""


def accuracy_table(metrics: Mapping[str, float]) -> str:
    """Accuracy of the model and of each branch alone, a line each, from what a test logged."""
    branches = _branches(metrics, "test/accuracy_branch").values()
    rows = [("the model", metrics["test/accuracy"])]
    rows += [(f"branch {key.rpartition('branch')[2]} alone", metrics[key]) for key in branches]
    return "\n".join(f"  {name:<16}{value:8.2%}" for name, value in rows)


def read_log(folder: Path) -> Log:
    """The metrics of a run by epoch, from its metrics*.csv; what a resumed run logged again replaces what was there."""
    log: Log = {}
    # metrics_0.csv, metrics_1.csv, ... are what stood there before the run was resumed; metrics.csv is the newest
    for path in [*sorted(folder.glob("metrics_*.csv"), key=lambda p: int(p.stem.partition("_")[2])), folder / "metrics.csv"]:
        if not path.is_file():
            continue
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if key not in ("epoch", "step") and value:
                        log.setdefault(key, {})[int(row["epoch"])] = float(value)
    return log


def draw(folder: Path) -> Path:
    """Writes folder/curves.png: loss and accuracy by epoch, and for heads with branches each one's accuracy and contribution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    log = read_log(folder)
    panels = [
        ("Loss", "cross entropy (nats)", {"training (as optimised)": "train/loss", "validation": "val/loss"}),
        ("Accuracy", "right answers (% of images)", {"training": "train/accuracy", "validation": "val/accuracy"}),
        ("Accuracy of each branch alone, validation", "right answers (% of images)", _branches(log, "val/accuracy_branch")),
        ("Contribution of each branch, validation", "std of its term over images (logits)", _branches(log, "contribution/branch")),
    ]
    panels = [panel for panel in panels if any(key in log for key in panel[2].values())]
    rows = (len(panels) + 1) // 2
    figure, grid = plt.subplots(rows, 2, figsize=(13, 3.8 * rows), squeeze=False, layout="constrained")
    for axis, (title, unit, curves) in zip(grid.flat, panels, strict=False):
        for number, (label, key) in enumerate(curves.items()):
            style = "-" if number < 10 else "--"  # matplotlib has ten colours
            epochs = sorted(log.get(key, {}))
            axis.plot([epoch + 1 for epoch in epochs], [log[key][epoch] for epoch in epochs], style, marker="o", markersize=3, label=label)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.set_ylabel(unit)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)  # beside the curves, not on them
        if "accuracy" in title.lower():
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=None))
            axis.set_ylim(top=1.01)
        else:
            axis.set_ylim(bottom=0)
    for axis in list(grid.flat)[len(panels) :]:
        axis.remove()
    path = folder / "curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _branches(log: Mapping[str, Any], prefix: str) -> dict[str, str]:
    keys = sorted((key for key in log if key.startswith(prefix)), key=lambda key: int(key.removeprefix(prefix)))
    return {f"branch {key.removeprefix(prefix)}": key for key in keys}
