"""Checkpoints of `interflow fit`: checked before anything is done with them, and loaded."""

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError, one_line
from .checkpoint_io import damaged, is_whole
from .classifier import CHECKPOINT_KEY, Classifier
from .finite import first_not_finite


def read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint; UserError unless it is a whole one of `interflow fit`, with finite weights of the model that it names."""
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    if not is_whole(path):
        raise UserError(damaged(path))
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip, eof and runtime errors, by what exactly is damaged
        raise UserError(damaged(path)) from error
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(key), dict) for key in (CHECKPOINT_KEY, "state_dict", "hyper_parameters")):
        raise UserError(f"{path} is not a checkpoint of `interflow fit`")
    try:
        with torch.device("meta"):
            expected = _model(checkpoint).state_dict()
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} names a model that this version does not have: {one_line(error)}") from error
    given = checkpoint["state_dict"]
    for key in sorted(set(expected) | set(given)):
        if key not in expected or key not in given or expected[key].shape != given[key].shape:
            raise UserError(f"{path} holds the weights of another model than the one it names: {key} does not fit")
    broken = first_not_finite(given)
    if broken is not None:
        raise UserError(f"{path} cannot be used: its {broken} is not finite, the training had failed by then; take an earlier checkpoint")
    return checkpoint


def load(path: Path) -> Classifier:
    """The trained classifier of a checkpoint, in eval mode on the CPU, with its preprocessing and class names."""
    checkpoint = read(path)
    classifier = _model(checkpoint)
    classifier.load_state_dict(checkpoint["state_dict"])
    try:
        classifier.on_load_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return classifier.eval()


def _model(checkpoint: dict[str, Any]) -> Classifier:
    # keys with an underscore are LightningCLI's own notes
    return Classifier(**{key: value for key, value in checkpoint["hyper_parameters"].items() if not key.startswith("_")})
