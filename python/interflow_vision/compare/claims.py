"""Measures of a run by name, and what figures say of a claim: it holds, does not hold, or is not decided."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import UserError
from . import statistics
from .plan import Cell, Claim
from .results import Result

Found = Mapping[Cell, Mapping[int, Result]]


def branch_accuracies(result: Result) -> list[float]:
    """Test accuracy of each branch alone, from the shallowest; [] for heads without branches."""
    found = {name: value for name, value in result["test"].items() if name.startswith("accuracy_branch")}
    return [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("accuracy_branch")))]


def contributions(result: Result) -> list[float]:
    """Of each branch to the logits, over the validation images; [] for heads that are no Interflow head."""
    found = result["contribution"]
    return [found[name] for name in sorted(found, key=lambda name: int(name.removeprefix("branch")))]


def _early(result: Result) -> float:
    branches = branch_accuracies(result)
    if len(branches) < 2:
        raise UserError(f"early_branches is for heads with branches, {result['cell']['arm']} has none")
    return sum(branches[:-1]) / (len(branches) - 1)


def _decades(norms: Sequence[float]) -> float:
    return math.log10(max(norms[0], 1e-30)) - math.log10(max(norms[-1], 1e-30))


def _over_training(result: Result) -> float:
    epochs = result["gradients"]["epochs"]
    return sum(map(_decades, epochs)) / len(epochs)


@dataclass(frozen=True)
class Measure:
    """A number of a run that has not diverged, in words with its unit; what it is multiplied by to be shown in that unit."""

    title: str
    unit: str
    factor: float
    of: Callable[[Result], float]


MEASURES = {
    "accuracy": Measure("test accuracy", "points", 100, lambda result: result["test"]["accuracy"]),
    "gap": Measure("accuracy on the training images less test accuracy", "points", 100, lambda r: r["training"]["accuracy"] - r["test"]["accuracy"]),
    "early_branches": Measure("mean test accuracy of all branches but the last, each alone", "points", 100, _early),
    "start_gradient": Measure(
        "gradient norm of the first convolution over the last one's, at start", "decades", 1, lambda r: _decades(r["gradients"]["start"])
    ),
    "gradient": Measure("the same, mean over the epochs", "decades", 1, _over_training),
}


@dataclass(frozen=True)
class Verdict:
    """A claim with its figure; verdict: "holds", "does not hold" or "not decided", by Student's interval of the paired difference."""

    claim: Claim
    verdict: str
    ours: float | None  # means over the seeds that count, in the measure's unit
    theirs: float | None
    difference: statistics.Difference | None  # in the measure's unit


def values(measure: Measure, results: Mapping[int, Result]) -> dict[int, float]:
    """By seed, in the measure's unit, of the runs that did not diverge."""
    return {seed: measure.factor * measure.of(result) for seed, result in results.items() if result["status"] == "done"}


def verdict(claim: Claim, found: Found) -> Verdict:
    """What the results say; "not decided" where an interval holds 0 or there are fewer than two seeds. UserError for a measure that does not exist."""
    if claim.measure not in MEASURES:
        raise UserError(f"measure must be one of {', '.join(MEASURES)}, got {claim.measure!r} in the claim {claim.says!r}")
    ours, theirs = (values(MEASURES[claim.measure], found.get(cell, {})) for cell in (claim.of, claim.than))
    difference = statistics.paired(ours, theirs)
    if difference is None:
        return Verdict(claim, "not decided", None, None, None)
    shared = sorted(set(ours) & set(theirs))
    word = "not decided"
    if difference.t is not None:
        low, high = difference.t if claim.expect == "greater" else (-difference.t[1], -difference.t[0])
        word = "holds" if low > 0 else "does not hold" if high < 0 else "not decided"
    means = [sum(side[seed] for seed in shared) / len(shared) for side in (ours, theirs)]
    return Verdict(claim, word, means[0], means[1], difference)
