"""One self-contained HTML page about one or several runs: curves, branches, mistakes, calibration, throughput, configuration."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median

import torch

from . import figures
from .curves import Log
from .evaluation import Evaluation

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 78rem; color: #1d2430; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.2rem; border-bottom: 1px solid #d5dae3; } h3 { font-size: 1.05rem; margin: 1rem 0 .3rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: .5rem 1.5rem; }
.panels > section.wide { grid-column: 1 / -1; }
img { max-width: 100%; height: auto; } p.note { color: #566074; margin: .2rem 0; font-size: .92rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .2rem .7rem; border-bottom: 1px solid #e4e8ef; white-space: nowrap; } th:first-child, td:first-child { text-align: left; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .8rem; }
figure { margin: 0; font-size: .82rem; } figure img { width: 100%; image-rendering: pixelated; }
pre { overflow-x: auto; background: #f4f6f9; padding: .8rem; font-size: .82rem; }
"""


@dataclass(frozen=True)
class Run:
    """What is known of a run.

    name: how the page calls it; folder: where it lies; log: its metrics by epoch; config: its config.yaml.
    evaluation, class_names, part: of its checkpoint on its data's part ("test" or "val"), None where that could not be done, for `reason`.
    """

    name: str
    folder: Path
    log: Log
    config: str
    parameters: int | None = None
    evaluation: Evaluation | None = None
    class_names: Sequence[str] = ()
    part: str = "test"
    reason: str = ""


def page(runs: Sequence[Run]) -> str:
    """The page."""
    names = ", ".join(run.name for run in runs)
    body = [f"<h1>{escape(names)}</h1>", "<h2>Summary</h2>", _summary(runs), "<h2>Curves</h2>", _panels(_curves({run.name: run.log for run in runs}))]
    for run in runs:
        body += [f"<h2>{escape(run.name)}</h2>", f'<p class="note">{escape(str(run.folder))}</p>', _panels(_of_run(run))]
        if run.evaluation is not None:
            body += [_mistakes(run), _classes(run)]
        elif run.reason:
            body.append(f'<p class="note">Not evaluated: {escape(run.reason)}</p>')
        body.append(f"<details><summary>Configuration</summary><pre>{escape(run.config)}</pre></details>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(names)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(body) + "\n</body></html>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _summary(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        found, log = run.evaluation, run.log
        accuracy = found.accuracy if found is not None else _last(log, "test/accuracy")
        rows.append(
            [
                run.name,
                f"{len(log.get('train/loss', {}))}",
                _percent(max(log.get("val/accuracy", {}).values(), default=None)),
                _percent(accuracy) + ("" if found is None or run.part == "test" else " (validation)"),
                _percent(found.top5 / max(1, found.images)) if found is not None and found.classes > 10 else "",
                f"{100 * found.calibration_error:.1f} %" if found is not None else "",
                f"{median(log['train/images_per_second'].values()):.0f}" if log.get("train/images_per_second") else "",
                _percent(median(log["train/data_wait"].values())) if log.get("train/data_wait") else "",
                f"{run.parameters:,}" if run.parameters is not None else "",
            ]
        )
    head = ("run", "epochs", "best validation accuracy", "test accuracy", "top 5", "calibration error", "images/s", "wait for images", "parameters")
    return _table(head, rows)


def _last(log: Log, key: str) -> float | None:
    values = log.get(key)
    return values[max(values)] if values else None


def _percent(value: float | None) -> str:
    return "" if value is None or value != value else f"{100 * value:.2f} %"


Panel = tuple[str, str, str, bool]
"""Title, note, HTML, whether it takes the whole width."""


def _panels(panels: Iterable[Panel]) -> str:
    parts = []
    for title, note, content, wide in panels:
        kind = ' class="wide"' if wide else ""
        note = f'<p class="note">{escape(note)}</p>' if note else ""
        parts.append(f"<section{kind}><h3>{escape(title)}</h3>{note}{content}</section>")
    return f'<div class="panels">{"".join(parts)}</div>'


def _image(url: str, what: str) -> str:
    return f'<img src="{url}" alt="{escape(what)}">'


def _curves(logs: Mapping[str, Log]) -> Iterable[Panel]:
    for title, unit, keys, percent, log_scale in (
        ("Loss", "cross entropy (nats)", {"training": "train/loss", "validation": "val/loss"}, False, False),
        ("Accuracy", "right answers (% of images)", {"training": "train/accuracy", "validation": "val/accuracy"}, True, False),
        ("Top 5, validation", "class among the five highest scores (% of images)", {"": "val/top5"}, True, False),
        ("Learning rate", "at the end of the epoch", {"": "learning_rate"}, False, False),
        ("Throughput", "images/s in training", {"": "train/images_per_second"}, False, False),
        ("Wait for images", "% of the training time", {"": "train/data_wait"}, True, False),
    ):
        found = figures.of_runs(logs, keys)
        if found:
            yield title, "", _image(figures.lines(found, unit, percent, log_scale), title), False


def _keyed(log: Log, prefix: str) -> dict[str, dict[int, float]]:
    return {
        key.removeprefix(prefix).replace("branch", "branch ").replace("stage", "stage "): log[key]
        for key in sorted(log, key=lambda key: (len(key), key))
        if key.startswith(prefix)
    }


def _of_run(run: Run) -> Iterable[Panel]:
    for title, note, prefix, unit, percent, log_scale in (
        (
            "Contributions by epoch",
            "How much each branch moves the scores of the validation images.",
            "contribution/",
            "std of its term (logits)",
            False,
            False,
        ),
        ("Each branch alone", "Accuracy on the validation images.", "val/accuracy_", "right answers (% of images)", True, False),
        ("Gradient norms", "Mean over the steps of an epoch, before clipping.", "gradient_norm/", "2-norm", False, True),
    ):
        found = _keyed(run.log, prefix)
        if found:
            yield title, note, _image(figures.lines(found, unit, percent, log_scale), title), False
    found_here = run.evaluation
    if found_here is None:
        return
    names, rows = run.class_names, [f"branch {i}" for i in range(1, found_here.branches + 1)]
    yield "Calibration", "", _image(figures.reliability(found_here), "accuracy by confidence"), False
    if found_here.branches:
        yield (
            "Where each branch is right alone",
            f"Of {found_here.images} {run.part} images: right by itself; right where no other branch is; right where the model is wrong.",
            _branches(found_here),
            False,
        )
        counts = found_here.confusion.sum(1).clamp(min=1)
        by_class = figures.heat_map(found_here.right / counts, [*rows, "the model"], names, "right answers (% of the class)", percent=True)
        yield "Each branch alone, by class", "", _image(by_class, "accuracy of branches by class"), True
    if found_here.contribution.count:
        heat = figures.heat_map(found_here.contribution.by_class().cpu(), rows, names, "std of its term (logits)")
        yield "Contributions by class", "", _image(heat, "contribution of branches by class"), True
    part = found_here.confusion if found_here.classes <= 12 else found_here.confusion / found_here.confusion.sum(1, keepdim=True).clamp(min=1)
    unit = "images" if found_here.classes <= 12 else "part of the class"
    yield "Confusion matrix", "Rows: the class. Columns: the answer.", _image(figures.heat_map(part, names, names, unit), "confusion matrix"), True


def _branches(found: Evaluation) -> str:
    total = max(1, found.images)
    accuracies = (found.right.sum(1) / total).tolist()
    rows = [
        [f"branch {i + 1}", _percent(accuracies[i]), f"{found.alone[i].item()}", f"{found.rescued[i].item()}"]
        for i in range(found.branches)
    ]  # fmt: skip
    return _table(("", "right", "the only branch", "model is wrong"), [*rows, ["the model", _percent(accuracies[-1]), "", ""]])


def _mistakes(run: Run) -> str:
    assert run.evaluation is not None
    found = figures.mistakes(run.evaluation.mistakes(), run.class_names)
    if not found:
        return "<h3>Mistakes</h3><p>None.</p>"
    shown = "".join(f'<figure><img src="{url}" alt=""><figcaption>{escape(caption)}</figcaption></figure>' for url, caption in found)
    pairs = [(run.class_names[a], run.class_names[b], f"{count}") for a, b, count in run.evaluation.confused()]
    table = _table(("class", "taken for", "images"), pairs)
    return f'<h3>The most confident mistakes</h3><div class="examples">{shown}</div><h3>The most frequent mistakes</h3>{table}'


def _classes(run: Run) -> str:
    assert run.evaluation is not None
    rows = [[name, f"{n}", *map(_percent, scores)] for name, (n, *scores) in zip(run.class_names, run.evaluation.per_class(), strict=True)]
    table = _table(("class", "images", "precision", "recall", "F1"), rows)
    many = len(rows) > 30
    return f"<details{'' if many else ' open'}><summary>Class by class</summary>{table}</details>"


def parameter_count(model: torch.nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in model.parameters())
