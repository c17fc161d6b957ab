"""The folder of a run: where the next and the newest one lie, its loggers, and what is done when training has ended."""

import re
import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from ..errors import UserError
from ..reports import curves
from . import samples

ROOT = Path("runs/digits")
"""Where runs lie by default: trainer.default_root_dir of digits.yaml."""


def all_runs(root: Path) -> list[Path]:
    """The folders root/version_N, the newest (highest N) first."""
    found = {int(match[1]): folder for folder in root.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", folder.name))}
    return [found[number] for number in sorted(found, reverse=True)]


def newest(root: Path) -> Path | None:
    """The folder root/version_N with the highest N, or None."""
    return next(iter(all_runs(root)), None)


def checkpoint(name: str, root: Path = ROOT, of_a_run: str = "best") -> Path:
    """The checkpoint file that an option names; UserError where there is none.

    name: "sample", the one that comes with the package; "best" or "last", of the newest run below `root` that has one; the
    folder of a run, whose `of_a_run` is taken, or the other of "best" and "last" where it has only that; anything else is a file.
    """
    if name == samples.NAME:
        return samples.checkpoint()
    if name in ("best", "last"):
        paths = [run / "checkpoints" / f"{name}.ckpt" for run in all_runs(root)]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise UserError(f"there is no {name} checkpoint yet: {paths[0] if paths else root / 'version_*'} does not exist; train one with `interflow fit`")
        return path
    given = Path(name)
    if not given.is_dir() or (given / ".metadata").is_file():  # a folder with .metadata is a sharded checkpoint
        return given
    for each in sorted(("best", "last"), key=lambda each: each != of_a_run):
        if (given / "checkpoints" / f"{each}.ckpt").is_file():
            return given / "checkpoints" / f"{each}.ckpt"
    raise UserError(f"the folder {given} is not that of a run: it has neither checkpoints/best.ckpt nor checkpoints/last.ckpt")


def run_of(path: Path) -> Path | None:
    """The folder version_N of a checkpoint in version_N/checkpoints, else None."""
    run = path.absolute().parent.parent
    return path.parent.parent if path.absolute().parent.name == "checkpoints" and re.fullmatch(r"version_\d+", run.name) else None


def goes_on_in(path: Path) -> Path | None:
    """The folder of the run that `fit` goes on in from this checkpoint: its own for last.ckpt, None (a new one) for any other."""
    return run_of(path) if path.name.startswith("last") else None


def require_writable(root: Path) -> None:
    """Makes the folder; UserError where nothing can be written into it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(f"the folder {root} cannot be written ({error.strerror}); choose another with --trainer.default_root_dir") from error


def loggers(root: str | Path, resumed: Path | None = None, step: int | None = None) -> list[Logger]:
    """CSV and TensorBoard logs in one new folder root/version_N, or in that of the run which is `resumed`.

    step: where the resumed run goes on; what TensorBoard has from there on, of a run that was killed later, is hidden.
    """
    version: int | None = None
    options: dict[str, Any] = {}
    if resumed is not None:
        root, version = resumed.parent, int(resumed.absolute().name.removeprefix("version_"))
        _keep_log(resumed)
        options = {"purge_step": step}
    log = CSVLogger(root, name="", version=version)
    return [log, TensorBoardLogger(root, name="", version=log.version, default_hp_metric=False, **options)]


@rank_zero_only
def _keep_log(run: Path) -> None:
    """Renames metrics.csv to the next metrics_N.csv: CSVLogger would delete it, curves.read_log reads them all."""
    if (run / "metrics.csv").is_file():
        (run / "metrics.csv").rename(run / f"metrics_{len(list(run.glob('metrics_*.csv')))}.csv")


def finish(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> dict[str, float] | None:
    """Tests the best checkpoint, prints the result and draws the log; returns what the test logged, None without a checkpoint."""
    callback = trainer.checkpoint_callback
    best = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
    if not best:
        return None
    metrics = dict(trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)[0])
    run = folder(trainer)
    if trainer.is_global_zero:
        print(f"\nTest accuracy of {_short(best)}\n{curves.accuracy_table(metrics)}")
        if any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            print(f"Curves: {_short(curves.draw(run))}")
    return metrics


def folder(trainer: Trainer) -> Path:
    """The folder of this trainer's run; every process must ask, since the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _short(path: str | Path) -> Path:
    """Relative to the working directory where it lies below."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
