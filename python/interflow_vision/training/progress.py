"""The progress of a training where nobody watches a bar: a line for each epoch."""

import sys
import time
from importlib.util import find_spec
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar


class EpochLines(ProgressBar):
    """In place of Lightning's progress bar, whose carriage returns fill log files: one line at the end of each epoch.

    epoch   3/16   training: loss 0.532, accuracy 91.2%   validation: loss 0.401, accuracy 95.1%   935 images/s   1.2 s

    Losses and accuracies as Classifier logs them, the validation's only where there was one in this epoch; seconds of the whole epoch.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._validated = False
        self._started = 0.0  # seconds, time.perf_counter

    def enable(self) -> None:
        """Prints lines again."""
        self._enabled = True

    def disable(self) -> None:
        """Prints nothing: Lightning asks for it on all processes but the first."""
        self._enabled = False

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What LightningModule.print and Trainer.print give."""
        if self._enabled:
            print(*args, **kwargs)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time runs from here."""
        self._started, self._validated = time.perf_counter(), False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Whatever the validation logged belongs to this epoch."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what the epoch came to."""
        if not self._enabled:
            return
        total = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        seen = {key: float(value) for key, value in trainer.callback_metrics.items()}
        parts = [f"epoch {trainer.current_epoch + 1:{max(0, len(total) - 1)}}{total}"]
        for title, prefix in (("training", "train"), *((("validation", "val"),) if self._validated else ())):
            values = [f"loss {seen[f'{prefix}/loss']:.3f}"] if f"{prefix}/loss" in seen else []
            values += [f"accuracy {seen[f'{prefix}/accuracy']:.1%}"] if f"{prefix}/accuracy" in seen else []
            parts += [f"{title}: {', '.join(values)}"] if values else []
        if "train/images_per_second" in seen:
            parts.append(f"{seen['train/images_per_second']:.0f} images/s")
        print("   ".join([*parts, f"{time.perf_counter() - self._started:.1f} s"]), flush=True)


def default_bar() -> list[ProgressBar]:
    """Lines where nobody watches; on a terminal Rich's bar where it is installed, else none, for which Lightning takes its own."""
    if not is_watched():
        return [EpochLines()]
    if find_spec("rich") is None:
        return []
    from .bar import TrainingBar

    return [TrainingBar()]


def is_watched() -> bool:
    """Whether stdout is a terminal, so that a bar that redraws itself makes sense."""
    return sys.stdout is not None and sys.stdout.isatty()
