"""The run that digits.yaml describes, without a command line: for the demo and its seeds."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from ..data.modules import Digits
from ..training import runs
from ..training.classifier import Classifier

CONFIG = Path(__file__).with_name("digits.yaml")
"""What `interflow fit` does by default."""


def prepare(root: Path, seed: int, **trainer_options: Any) -> tuple[Trainer, Classifier, Digits]:
    """Trainer, model and data of a run below `root`; `seed` is for weights, order and augmentation, the split stays the same."""
    config = yaml.safe_load(CONFIG.read_text())
    seed_everything(seed, workers=True, verbose=False)
    model, data = Classifier(**config["model"]), Digits(**config["data"]["init_args"])
    callbacks = [ModelCheckpoint(**config["checkpoint"]), *trainer_options.pop("callbacks", [])]
    options = config["trainer"] | {"default_root_dir": root} | trainer_options
    return Trainer(callbacks=callbacks, logger=runs.loggers(root), **options), model, data
