"""`interflow compare`: trains a study's runs side by side, each once, and makes the page of their results."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import UserError

if TYPE_CHECKING:
    from ..compare import plan


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """Of the subcommand's arguments."""
    made = Parser(
        "interflow compare",
        description="Trains arms x seeds x data sets x networks of a study, in processes side by side, and makes a page of the results: report.md, report.html "
        "and pictures. The learning rate of each arm is chosen on validation images, the test images are read once. Runs that have a result are not made "
        "again; one that was interrupted goes on where it stopped: give the same command again.",
    )
    made.add_argument("study", type=Path, metavar="STUDY", help="the YAML file; interflow_vision/compare/plan.py says what stands in it")
    made.add_argument("--out", type=Path, metavar="FOLDER", help="where results go, and the page (default: the folder of STUDY, results/ in it)")
    made.add_argument("--jobs", type=int, metavar="N", help="processes side by side (default: the GPUs, or the cores that there are for the study's threads)")
    made.add_argument("--page", action="store_true", help="train nothing: make the page from the results that there are")
    made.add_argument("--plan", action="store_true", help="train nothing: say what there is and what is left to do")
    made.add_argument("--again", metavar="DATA/NETWORK/ARM", help="train one arm anew, with seeds that the study does not have and the learning rate that it "
                      "chose, and say whether the result lands in the interval of the committed ones; nothing is kept")  # fmt: skip
    made.add_argument("--runs", type=int, default=1, metavar="N", help="how many seeds --again takes (default: %(default)s)")
    return made


def main(argv: Sequence[str]) -> int:
    """The exit code: 0, or 1 where --again lands outside."""
    given = parser().parse_args(argv)
    from ..compare import page, results, workers
    from ..compare.plan import read

    study = read(given.study)
    out = given.study.parent if given.out is None else given.out
    folder = out / "results"
    command = f"interflow compare {given.study}"
    for name in ("jobs", "runs"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, got {value}")
    jobs = workers.default_jobs(study.threads) if given.jobs is None else given.jobs
    if given.again is not None:
        return _again(study, folder, given.again, given.runs, jobs)
    if given.plan:
        _say_plan(study, folder)
        return 0
    if not given.page:
        with workers.alone(folder):
            workers.train(results.missing(study.tuning(), folder), folder, jobs, study.threads, _say)
            workers.train(results.missing(study.finals(results.chosen_rates(study, folder)), folder), folder, jobs, study.threads, _say)
    for path in page.write(study, folder, out, command)[:2]:
        print(path)
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _say_plan(study: "plan.Study", folder: Path) -> None:
    from ..compare import results

    tuning = list(study.tuning())
    left = results.missing(tuning, folder)
    print(f"{len(study.seeds)} cells; tuning: {len(tuning) - len(left)} of {len(tuning)} runs done")
    total = sum(map(len, study.seeds.values()))
    if left:
        print(f"runs that count: {total}, once the learning rates are chosen")
    else:
        finals = results.missing(study.finals(results.chosen_rates(study, folder)), folder)
        print(f"runs that count: {total - len(finals)} of {total} done")


def _again(study: "plan.Study", folder: Path, name: str, count: int, jobs: int) -> int:
    """Trains a cell with new seeds into a folder of its own; 0 where their mean lies in the prediction interval of the committed runs, else 1."""
    from ..compare import results, statistics, workers
    from ..compare.plan import Cell

    cell = Cell(*name.split("/")) if name.count("/") == 2 else None
    if cell is None or cell not in study.seeds:
        raise UserError(f"--again must be one of the study's cells, such as {next(iter(study.seeds))}, got {name!r}")
    before = list(results.accuracies(results.finals(study, folder).get(cell, {})).values())
    rate = results.chosen_rates(study, folder)[cell]
    first = max(max(seeds) for seeds in (*study.seeds.values(), study.tuning_seeds)) + 1
    runs = [study.run(cell, first + i, rate, final=True) for i in range(count)]
    with tempfile.TemporaryDirectory() as scratch:
        workers.train(runs, Path(scratch), min(jobs, count), study.threads, _say)
        now = list(results.accuracies({run.seed: results.read(Path(scratch) / run.path) for run in runs}).values())
    bounds = statistics.lands_in(now, before)
    if bounds is None:
        raise UserError(f"{cell} has {len(before)} runs in {folder} and {len(now)} new ones: an interval needs two and one that have not diverged")
    mean = sum(now) / len(now)
    inside = bounds[0] <= mean <= bounds[1]
    print(f"{cell}: test accuracy {mean:.2%}, {'inside' if inside else 'outside'} of {bounds[0]:.2%} to {bounds[1]:.2%}, where 95 % of new runs lie")
    return 0 if inside else 1
