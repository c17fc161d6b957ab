"""The states of all random number generators, kept in a checkpoint so that a resumed run draws what the unbroken one would."""

import random
import warnings
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from ..processes import gathered, own

KEY = "interflow_vision_random_states"
"""Where a checkpoint keeps them, a list with an entry for each process."""


def states(device: torch.device | None = None) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the one of `device`; tensors and numbers only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    kept = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type in ("cuda", "xpu"):
        kept[device.type] = getattr(torch, device.type).get_rng_state(device)
    elif device is not None and device.type == "mps":
        kept["mps"] = torch.mps.get_rng_state()
    return kept


def restore(kept: dict[str, Any], device: torch.device | None = None) -> None:
    """Sets the generators to what `states` gave."""
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, normal = kept["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, normal))
    torch.set_rng_state(kept["torch"].cpu())
    if device is not None and device.type in kept:
        if device.type == "mps":
            torch.mps.set_rng_state(kept["mps"].cpu())
        else:
            getattr(torch, device.type).set_rng_state(kept[device.type].cpu(), device)


class KeepRandomStates(Callback):
    """Saves the states of every process with each checkpoint, and sets them again when `fit` goes on from one."""

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the states."""
        checkpoint[KEY] = gathered(states(trainer.strategy.root_device))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Sets them, for `fit` only."""
        if trainer.state.fn != TrainerFn.FITTING or KEY not in checkpoint:
            return
        if len(checkpoint[KEY]) != trainer.world_size:
            warnings.warn(
                f"the run had {len(checkpoint[KEY])} processes and goes on with {trainer.world_size}: "
                "its numbers will not be those of a run that was never interrupted",
                stacklevel=1,
            )
        self._kept = own(checkpoint[KEY])
        self._set(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets them again where the strategy's setup has drawn numbers since."""
        self._set(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the run draws its own numbers."""
        self._kept = None

    def _set(self, trainer: Trainer) -> None:
        if self._kept is not None:
            restore(self._kept, trainer.strategy.root_device)
