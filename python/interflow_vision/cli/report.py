"""`interflow report`: one HTML page about one or several runs."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from interflow_kernels import InterflowHead

from ..errors import UserError, one_line
from ..models.wrappers import unwrapped
from ..reports import curves, page
from ..reports.contribution import branch_terms
from ..reports.evaluation import Evaluation
from ..training import checkpoints, resume_options, runs
from ..training.classifier import Classifier
from ..training.quiet import quiet
from .predict import Parser, usable_device


def parser() -> Parser:
    """Of the subcommand's arguments."""
    made = Parser(
        "interflow report",
        description="Writes one self-contained HTML page about runs of `interflow fit`: curves of all, and for each its branches, contributions, "
        "confusion matrix, calibration, classes, mistakes as pictures, throughput and configuration. Each run's checkpoint is evaluated once more.",
    )
    made.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="the folder of a run, such as runs/digits/version_0")
    made.add_argument("--out", type=Path, metavar="FILE", help="where the page goes (default: report.html in the folder of the first run)")
    made.add_argument("--part", choices=("test", "val"), default="test", help="the images that are evaluated (default: %(default)s)")
    made.add_argument("--ckpt", choices=("best", "last"), default="best", help="the checkpoint of each run (default: %(default)s)")
    made.add_argument("--data-root", metavar="FOLDER", help="where the data lie now, if not where they lay in training")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    made.add_argument("--no-evaluation", action="store_true", help="only what the runs have logged, without their data")
    return made


def main(argv: Sequence[str]) -> int:
    """Writes the page and prints where it is; the exit code is 1 where a run could not be evaluated, with a line on stderr that says why."""
    given = parser().parse_args(argv)
    quiet()
    device = usable_device(given.device)
    for folder in given.runs:
        if not folder.is_dir():
            raise UserError(f"there is no run {folder}: give the folder of a run, such as runs/digits/version_0")
        if not (folder / "config.yaml").is_file() and not list(folder.glob("metrics*.csv")):
            raise UserError(f"the folder {folder} is not that of a run: it has neither config.yaml nor metrics.csv")
    found = [read(folder, name, given, device) for folder, name in zip(given.runs, _names(given.runs), strict=True)]
    out = given.out or given.runs[0] / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page.page(found))
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another with --out") from error
    print(out)
    reasons = [f"{run.folder} was not evaluated: {run.reason}" for run in found if run.reason]
    for reason in reasons:
        print(f"interflow: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def _names(folders: Sequence[Path]) -> list[str]:
    """As short as they may be and still differ: digits/version_0, or one folder more, or the whole path."""
    for parts in (2, 3):
        names = ["/".join(folder.resolve().parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read(folder: Path, name: str, given: argparse.Namespace, device: torch.device) -> page.Run:
    """What is known of a run; with its evaluation, unless it is not wanted or cannot be had."""
    log, config = curves.read_log(folder), folder / "config.yaml"
    known: dict[str, Any] = {"name": name, "folder": folder, "log": log, "config": config.read_text() if config.is_file() else "", "part": given.part}
    if given.no_evaluation:
        return page.Run(**known)
    try:
        path = runs.checkpoint(str(folder), of_a_run=given.ckpt)
        classifier = checkpoints.load(path)
        known["parameters"] = page.parameter_count(classifier.model)
        data = data_of(path, given.data_root)
        found = evaluate(classifier.to(device), data, given.part, device)
    except UserError as error:
        return page.Run(**known, reason=one_line(error))
    names = classifier.class_names or tuple(map(str, range(found.classes)))
    return page.Run(**known, evaluation=found, class_names=names)


def data_of(path: Path, root: str | None) -> Any:
    """The data module of a checkpoint, as it was in training, but for where the data lie; UserError where it cannot be made again."""
    options = resume_options.kept(torch.load(path, map_location="cpu", weights_only=True), runs.run_of(path)).get("data")
    if options is None:
        raise UserError(f"{path} does not say which data set it was trained on")
    module, _, name = str(options["class_path"]).rpartition(".")
    try:
        init = dict(options.get("init_args") or {})
        if root is not None:
            init["root"] = root
        found = getattr(importlib.import_module(module), name)
        if not (isinstance(found, type) and issubclass(found, LightningDataModule)):  # a checkpoint must not choose what else is called
            raise TypeError("it is not a LightningDataModule")
        return found(**init)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"the data set {options['class_path']} of {path} cannot be made again: {one_line(error)}") from error


@torch.inference_mode()
def evaluate(classifier: Classifier, data: Any, part: str, device: torch.device) -> Evaluation:
    """The classifier on all images of a part."""
    data.prepare_data()
    data.setup("test" if part == "test" else "fit")
    loader = data.test_dataloader() if part == "test" else data.val_dataloader()
    model, rule = classifier.model, classifier.preprocessing
    head = unwrapped(model.head)
    found: Evaluation | None = None
    for batch in loader:
        x, target = data.on_after_batch_transfer([each.to(device) for each in batch], 0)
        logits, branches = model.forward_branches(x) if model.has_branches else (model(x), None)
        terms = branch_terms(head, branches.to(head.weight.dtype)) if branches is not None and isinstance(head, InterflowHead) else None
        if found is None:
            found = Evaluation(logits.shape[1], 0 if branches is None else branches.shape[1])
        found.update(logits, target, _shown(x, rule), branches, terms)
    if found is None:
        raise UserError(f"the data set has no {part} images")
    return found


def _shown(x: Tensor, rule: Any) -> Tensor:
    """Normalised images back in [0, 1], as far as it is known how they were prepared."""
    if rule is None:
        low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
        return (x - low) / (high - low).clamp(min=1e-12)
    mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (rule.mean, rule.std))
    return x * std + mean
