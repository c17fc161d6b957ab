"""Models by name."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from .vgg import VGG, plain, vgg16, vgg16_bn

_MODELS: dict[str, Callable[..., VGG]] = {"vgg16": vgg16, "vgg16_bn": vgg16_bn}


def list_models() -> list[str]:
    """The names that create_model knows."""
    return sorted(_MODELS)


def create_model(name: str, attention: str = "nxn", num_classes: int = 10, head: str = "fused", **options: Any) -> VGG:
    """The model called `name`, e.g. create_model("vgg16_bn", attention="nxn", num_classes=10).

    Args:
        name: one of list_models(), or "plainN", such as "plain32", for N convolutions without norms (vgg.plain).
        attention: "hard", "1xn", "nxn", "classwise" or "gated", see InterflowHead.
        num_classes: K.
        head: "fused", "eager" (both Interflow), "auxiliary", "concat" or "last" (the plain network), see heads.py.
        options: further arguments of the model, see VGG: stage, width, stages, pool_size, norm, branch_loss, pretrained, ...

    Raises ValueError for an unknown name and for options that do not fit.
    """
    number = re.fullmatch(r"plain([1-9]\d{0,3})", name)
    if name not in _MODELS and not number:
        raise ValueError(f"name must be one of {', '.join(map(repr, list_models()))}, or 'plainN' with N convolutions, got {name!r}")
    model = partial(plain, int(number[1])) if number else _MODELS[name]
    return model(attention=attention, num_classes=num_classes, head=head, **options)
