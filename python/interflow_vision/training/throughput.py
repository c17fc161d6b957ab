"""Whether the reading of images keeps up with the training: the time that steps wait for data, and how many workers would help."""

import math
import os
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_info

LIMIT = 0.15
"""Part of an epoch's time above which waiting for images is told."""


class DataWait(Callback):
    """Logs train/data_wait, the part of an epoch's time in which steps wait for their images, and says so where that is much.

    The first batch of an epoch does not count: its workers are just starting. The sentence comes once, after the first epoch that is slow.
    """

    def __init__(self) -> None:
        self.waited = self.stepped = 0.0  # seconds
        """Of this epoch, from its second batch on."""
        self.images = 0
        self._since: float | None = None
        self._said = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts anew."""
        self.waited, self.stepped, self.images, self._since = 0.0, 0.0, 0, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there."""
        now = time.perf_counter()
        if self._since is not None:
            self.waited += now - self._since
        self._began = now

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The step is done; from here on the next batch is awaited."""
        now = time.perf_counter()
        if self._since is not None:
            self.stepped += now - self._began
            self.images += len(batch[1])
        self._since = now
        if trainer.is_last_batch and self.images:  # before validation, which belongs to the epoch
            pl_module.log("train/data_wait", self.share, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One in the middle of an epoch is no waiting."""
        self._since = None

    @property
    def share(self) -> float:
        """Part of the time that was waited, 0 where nothing was counted."""
        total = self.waited + self.stepped
        return self.waited / total if total > 0 else 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says once what the limit is."""
        if self._said or not self.images or self.share <= LIMIT or self.waited + self.stepped < 2:
            return
        self._said = True
        workers = getattr(trainer.train_dataloader, "num_workers", 0)
        rank_zero_info(sentence(self.images, self.waited, self.stepped, workers, os.cpu_count() or 1))


def sentence(images: int, waited: float, stepped: float, workers: int, cores: int) -> str:
    """What a slow reading costs and what would help. images: of the time measured; waited, stepped: seconds."""
    needed = images / stepped
    given = images / (waited + stepped)
    rate = given / workers if workers else images / waited  # of one reader: workers read all the time, without them in turns with the steps
    enough = max(workers + 1, math.ceil(needed / rate))
    text = f"reading images limits this training: steps wait {waited / (waited + stepped):.0%} of the time; they take {needed:.0f} images/s"
    text += f" and get {given:.0f} from {workers or 'no'} worker{'s' if workers != 1 else ''}; about --data.num_workers {enough} would keep up"
    return text + (f", more than this machine's {cores} cores: smaller files, --data.size or another machine help" if enough > cores else "")
