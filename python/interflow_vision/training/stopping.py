"""How a run ends early: by a signal, with a checkpoint and the command that goes on; by an error, in all processes."""

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ..processes import EveryProcessError

_GRACE = 5.0
"""Seconds that the other processes have to end by themselves."""


class StopOnSignal(Checkpoint):
    """On SIGTERM or Ctrl-C: finishes the batch, saves last.ckpt, and ends with exit code 143 or 130.

    All processes of a training stop after the same batch, whichever got the signal. A signal during validation waits for
    its end. A second one ends the process at once, with what was saved before. Under SLURM, SIGTERM stays Lightning's, which
    requeues the job.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        """The signal, once there was one."""
        self._stopping = False  # all processes know
        self._earlier: dict[int, Any] = {}

    @staticmethod
    def path(trainer: Trainer) -> Path | None:
        """Where last.ckpt lies, None where this run writes no checkpoints."""
        callback = trainer.checkpoint_callback
        folder = callback.dirpath if isinstance(callback, ModelCheckpoint) else None
        return None if folder is None else Path(folder) / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}{ModelCheckpoint.FILE_EXTENSION}"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the signals over; Lightning's own handler of SIGTERM could meet other communication half-way."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in [signal.SIGINT] if SLURMEnvironment.detect() else [signal.SIGINT, signal.SIGTERM]:
            self._earlier[signum] = signal.signal(signum, self._handle)

    def _handle(self, signum: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received = signum
            return
        for each, handler in self._earlier.items():
            signal.signal(each, handler)
        raise KeyboardInterrupt

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Saves and stops, unless the epoch ends here and with it a checkpoint comes anyway."""
        if not trainer.is_last_batch and self._all_stop(trainer):
            self._save(trainer)
            raise SystemExit(128 + int(self.received or signal.SIGTERM))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves; what the epoch logs is still to be written."""
        if self._all_stop(trainer):
            self._save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops where the epoch before has saved."""
        if self._stopping:
            raise SystemExit(128 + int(self.received or signal.SIGTERM))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the signals back; one that came in the last epoch ends the run here, trained to its end."""
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)
        if self._stopping:
            raise SystemExit(128 + int(self.received or signal.SIGTERM))

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Gives the signals back."""
        for signum, handler in self._earlier.items():
            signal.signal(signum, handler)

    def _all_stop(self, trainer: Trainer) -> bool:
        self._stopping = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        return self._stopping

    def _save(self, trainer: Trainer) -> None:
        path = self.path(trainer)
        if path is not None:
            trainer.save_checkpoint(path)


@contextlib.contextmanager
def ending_together(trainer: Trainer) -> Iterator[None]:
    """Around what a trainer does: one sentence, one exit code, and no process that goes on waiting for the others.

    A signal ends with 143 or 130 and the command that goes on; an error that all processes have is told by the first.
    """
    try:
        yield
    except BaseException as error:
        code = _code(trainer, error)
        if code is not None and trainer.is_global_zero:
            print(f"interflow: {_farewell(trainer, code)}", file=sys.stderr)
        _end_others(trainer)
        if code is not None:
            raise SystemExit(code) from None
        if isinstance(error, EveryProcessError) and not trainer.is_global_zero:
            raise SystemExit(2) from None
        raise


def _code(trainer: Trainer, error: BaseException) -> int | None:
    """The exit code where a signal is the cause, else None."""
    if isinstance(error, SIGTERMException):
        return 128 + signal.SIGTERM
    # Lightning makes sys.exit(1) of a KeyboardInterrupt
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)):
        callback = next((c for c in trainer.callbacks if isinstance(c, StopOnSignal)), None)
        return 128 + int(signal.SIGINT if callback is None or callback.received is None else callback.received)
    if isinstance(error, SystemExit) and error.code in (128 + signal.SIGTERM, 128 + signal.SIGINT):
        return int(error.code)
    return None


def _farewell(trainer: Trainer, code: int) -> str:
    name = signal.Signals(code - 128).name
    path = StopOnSignal.path(trainer)
    if path is None or not path.is_file():
        return f"stopped by {name}; there is no checkpoint to go on from"
    path = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    done = f"in epoch {trainer.current_epoch}, after step {trainer.global_step}"
    return f"stopped by {name} {done}; go on with: interflow fit --ckpt_path {path}"


def _end_others(trainer: Trainer) -> None:
    """Waits for the processes that this one has started, and ends those that do not."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
