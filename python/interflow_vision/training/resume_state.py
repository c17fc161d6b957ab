"""What a checkpoint keeps beside Lightning's own so that a run which goes on from it draws and reads what the unbroken one would.

What holds: a run that goes on from any checkpoint, written between epochs or in the middle of one, has the bits of the
unbroken run, with the same number of processes, the same options and a ResumableLoader (loading.py). With another
DataLoader it holds between epochs, where its workers are not persistent. The training means that are logged for an epoch in
whose middle a run has stopped are those of its second part.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_warn

from ..data.loading import ResumableLoader
from ..data.random_states import restore, states
from ..processes import gathered, own

KEY = "interflow_vision_random_states"
"""Where a checkpoint keeps it: "states", one for each process, and "place", of the loader in an epoch that is not over."""


class KeepRandomStates(Callback):
    """Saves with each checkpoint what every process will draw, and where in its data it is; sets both when `fit` goes on."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._place: dict[str, Any] | None = None  # in the epoch, of the loader

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the states."""
        loader = trainer.train_dataloader
        place = loader.state_dict() if isinstance(loader, ResumableLoader) and not trainer.is_last_batch else None
        checkpoint[KEY] = {"states": gathered(states(trainer.strategy.root_device)), "place": place}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets them, for `fit` only."""
        if trainer.state.fn != TrainerFn.FITTING or KEY not in checkpoint:
            return
        kept = checkpoint[KEY]["states"]
        if len(kept) != trainer.world_size:
            rank_zero_warn(
                f"the run had {len(kept)} processes and goes on with {trainer.world_size}: its numbers will not be those of a run that was never interrupted"
            )
        self._kept, self._place = own(kept), checkpoint[KEY]["place"]
        self._set(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets them again where the strategy's setup has drawn numbers since."""
        self._set(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the run draws its own numbers. Lightning forgets a loader's place where the schedule asked for its length."""
        loader = trainer.train_dataloader
        if self._place is not None and isinstance(loader, ResumableLoader):
            loader.load_state_dict(self._place)
        self._kept = self._place = None

    def _set(self, trainer: Trainer) -> None:
        if self._kept is not None:
            restore(self._kept, trainer.strategy.root_device)
