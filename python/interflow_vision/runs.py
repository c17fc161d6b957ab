"""The folder of a run: where the next and the newest one lie, its loggers, and what is done when training has ended."""

import re
import tempfile
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning_utilities.core.rank_zero import rank_zero_only

from . import report
from .errors import UserError


def newest(root: Path) -> Path | None:
    """The folder root/version_N with the highest N, or None."""
    found = {int(match[1]): folder for folder in root.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", folder.name))}
    return found[max(found)] if found else None


def checkpoint(name: str, root: Path) -> Path:
    """ "best" and "last" as the checkpoint of the newest run below `root`, anything else as a path; UserError where there is none."""
    if name not in ("best", "last"):
        return Path(name)
    run = newest(root)
    path = None if run is None else run / "checkpoints" / f"{name}.ckpt"
    if path is None or not path.is_file():
        raise UserError(f"there is no {name} checkpoint yet: {path or root / 'version_*'} does not exist; train one with `interflow fit`")
    return path


def require_writable(root: Path) -> None:
    """Makes the folder; UserError where nothing can be written into it."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(f"the folder {root} cannot be written ({error.strerror}); choose another with --trainer.default_root_dir") from error


def loggers(root: str | Path, resumed: Path | None = None) -> list[Logger]:
    """CSV and TensorBoard logs in one new folder root/version_N, or in that of the run which is `resumed`."""
    version = None
    if resumed is not None:
        version = int(resumed.name.removeprefix("version_"))
        _keep_log(resumed)
    log = CSVLogger(root, name="", version=version)
    return [log, TensorBoardLogger(root, name="", version=log.version, default_hp_metric=False)]


@rank_zero_only
def _keep_log(run: Path) -> None:
    """Renames metrics.csv to the next metrics_N.csv: CSVLogger would delete it, report.read_log reads them all."""
    if (run / "metrics.csv").is_file():
        (run / "metrics.csv").rename(run / f"metrics_{len(list(run.glob('metrics_*.csv')))}.csv")


def finish(trainer: Trainer, model: LightningModule, data: LightningDataModule) -> dict[str, float] | None:
    """Tests the best checkpoint, prints the result and draws the log; returns what the test logged, None without a checkpoint."""
    callback = trainer.checkpoint_callback
    best = callback.best_model_path if isinstance(callback, ModelCheckpoint) else ""
    if not best:
        return None
    metrics = dict(trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)[0])
    if trainer.is_global_zero:
        print(f"\nTest accuracy of {_short(best)}\n{report.accuracy_table(metrics)}")
        if any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            print(f"Curves: {_short(report.draw(folder(trainer)))}")
    return metrics


def folder(trainer: Trainer) -> Path:
    """The folder of this trainer's run."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def _short(path: str | Path) -> Path:
    """Relative to the working directory where it lies below."""
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
