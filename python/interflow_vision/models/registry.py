"""Models by name."""

from collections.abc import Callable
from typing import Any

from .vgg import VGG, vgg16, vgg16_bn

_MODELS: dict[str, Callable[..., VGG]] = {"vgg16": vgg16, "vgg16_bn": vgg16_bn}


def list_models() -> list[str]:
    """The names that create_model knows."""
    return sorted(_MODELS)


def create_model(name: str, attention: str = "nxn", num_classes: int = 10, head: str = "fused", **options: Any) -> VGG:
    """The model called `name`, e.g. create_model("vgg16_bn", attention="nxn", num_classes=10).

    Args:
        name: one of list_models().
        attention: "hard", "1xn", "nxn", "classwise" or "gated", see InterflowHead.
        num_classes: K.
        head: "fused", "eager" (both Interflow), "auxiliary", "concat" or "last" (the plain network), see heads.py.
        options: further arguments of the model, see VGG: stage, width, stages, pool_size, pretrained, ...

    Raises ValueError for an unknown name and for options that do not fit.
    """
    if name not in _MODELS:
        raise ValueError(f"name must be one of {', '.join(map(repr, list_models()))}, got {name!r}")
    return _MODELS[name](attention=attention, num_classes=num_classes, head=head, **options)
