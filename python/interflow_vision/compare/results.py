"""The results of a study: one JSON file a run, written once; and the learning rate of each cell, chosen on validation."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from ..errors import UserError, one_line
from .plan import Cell, Run, Study

Result = dict[str, Any]

UNFINISHED = "unfinished"
"""The folder beside the results where runs that were interrupted keep their checkpoint."""


def digest(run: Run) -> str:
    """Of all that the run's numbers follow from; a result with another one is of another run."""
    told = {**run.options, "seed": run.seed, "rate": run.rate, "final": run.final}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def write(path: Path, result: Result) -> None:
    """At every moment there is the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(beside, path)


def read(path: Path) -> Result:
    """UserError where the file is broken."""
    try:
        found = json.loads(path.read_text())
        if not {"digest", "cell", "seed", "rate", "status"} <= set(found):
            raise ValueError("it lacks what a result has")
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is no result of a run ({one_line(error)}); remove it, and the run is made again") from error


def missing(runs: Iterable[Run], folder: Path) -> list[Run]:
    """The runs that have no result yet; UserError where one has the result of other options."""
    left = []
    for run in runs:
        path = folder / run.path
        if not path.is_file():
            left.append(run)
        elif read(path)["digest"] != digest(run):
            raise UserError(f"{path} was made with other options than the study has now: remove it, or give another folder with --out")
    return left


def chosen_rates(study: Study, folder: Path) -> dict[Cell, float]:
    """Of each cell the rate with the best validation accuracy, a mean over the tuning seeds; the smallest of equals.

    A rate with which a run diverged is not chosen; where all have diverged it is the smallest. UserError where a tuning run has no result yet.
    """
    if len(study.rates) == 1:
        return dict.fromkeys(study.seeds, study.rates[0])
    return {cell: max(sorted(found), key=lambda rate: found[rate]) for cell, found in tuning_accuracies(study, folder).items()}


def tuning_accuracies(study: Study, folder: Path) -> dict[Cell, dict[float, float]]:
    """Validation accuracy of each cell and rate, a mean over the tuning seeds; -1 where a run diverged."""
    found: dict[Cell, dict[float, list[float]]] = {}
    for run in study.tuning():
        path = folder / run.path
        if not path.is_file():
            raise UserError(f"there is no {path}: train the study first, `interflow compare STUDY`")
        result = read(path)
        found.setdefault(run.cell, {}).setdefault(run.rate, []).append(result["validation"]["accuracy"] if result["status"] == "done" else -1.0)
    return {cell: {rate: -1.0 if min(values) < 0 else mean(values) for rate, values in rates.items()} for cell, rates in found.items()}


def finals(study: Study, folder: Path) -> dict[Cell, dict[int, Result]]:
    """By cell and seed, the results of all final runs that there are; cells without any are left out."""
    found: dict[Cell, dict[int, Result]] = {}
    for cell, seeds in study.seeds.items():
        paths = {seed: folder / study.run(cell, seed, study.rates[0], final=True).path for seed in seeds}
        have = {seed: read(path) for seed, path in paths.items() if path.is_file()}
        if have:
            found[cell] = have
    return found


def accuracies(results: Mapping[int, Result]) -> dict[int, float]:
    """Test accuracy by seed, of the runs that did not diverge."""
    return {seed: result["test"]["accuracy"] for seed, result in results.items() if result["status"] == "done"}
