"""The progress bar of a terminal: Rich's, with images a second, the wait for data and the time that is left of the whole training."""

import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from .throughput import DataWait


class TrainingBar(RichProgressBar):
    """RichProgressBar with `images/s` (of this epoch), `wait` (part of the time in which steps wait for images) and `left` (of all epochs)."""

    def __init__(self) -> None:
        super().__init__(leave=True)
        self._images = 0
        self._epoch_began = self._began = 0.0  # seconds, time.perf_counter
        self._done_before = 0  # steps that an earlier run has taken

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time runs from here."""
        super().on_train_start(trainer, pl_module)
        self._began, self._done_before = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts anew."""
        super().on_train_epoch_start(trainer, pl_module)
        self._images, self._epoch_began = 0, time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Counts the images."""
        self._images += len(batch[1]) * trainer.world_size
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, int | str | float | dict[str, float]]:
        """Lightning's, and ours."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        now = time.perf_counter()
        if self._images:
            shown["images/s"] = f"{self._images / (now - self._epoch_began):.0f}"
        wait = next((callback for callback in trainer.callbacks if isinstance(callback, DataWait)), None)  # type: ignore[attr-defined]
        if wait is not None and wait.images:
            shown["wait"] = f"{wait.share:.0%}"
        left = seconds_left(trainer.global_step - self._done_before, now - self._began, trainer.estimated_stepping_batches - trainer.global_step)
        if left is not None:
            shown["left"] = str(timedelta(seconds=round(left)))
        return shown


def seconds_left(done: int, taken: float, steps: float) -> float | None:
    """For the steps that remain, at the speed so far; None where it is not known."""
    return taken / done * max(0.0, steps) if done > 0 and steps < float("inf") else None
