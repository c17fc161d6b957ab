"""Starting from weights that were trained for something else: the trunk of another run's checkpoint."""

from pathlib import Path

import torch
from torch import nn

from ..processes import EveryProcessError
from .checkpoint_io import damaged, is_whole
from .finite import first_not_finite


def take_trunk(model: nn.Module, path: Path) -> None:
    """Puts everything but the head of a checkpoint of `interflow fit` into a network; the number of classes may differ.

    EveryProcessError where the file is missing, damaged, no such checkpoint, or of another trunk.
    """
    if not path.is_file():
        raise EveryProcessError(f"there is no checkpoint {path} for --model.trunk_from")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True) if is_whole(path) else None
    except Exception:  # pickle, zip, eof and runtime errors, by what exactly is damaged
        content = None
    if content is None:
        raise EveryProcessError(damaged(path))
    found = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(found, dict):
        raise EveryProcessError(f"{path} is not a checkpoint of `interflow fit`")
    given = {key.removeprefix("model."): value for key, value in found.items() if not key.startswith("model.head.")}
    own = {key: value for key, value in model.state_dict().items() if not key.startswith("head.")}
    for key in sorted(set(given) | set(own)):
        if key not in given or key not in own or given[key].shape != own[key].shape:
            raise EveryProcessError(f"{path} has another trunk than this model: {key} does not fit; give --model.name and --model.width of that run")
    broken = first_not_finite(given)
    if broken is not None:
        raise EveryProcessError(f"{path} cannot be used: its {broken} is not finite, the training had failed by then; take an earlier checkpoint")
    model.load_state_dict(given, strict=False)
