"""Interflow networks under names of their own in timm's registry: timm.create_model("interflow_resnet50", num_classes=10)."""

import sys
from collections.abc import Callable
from typing import Any

from .attaching import attach
from .choosing import nearest
from .timm_backbones import timm

PREFIX = "interflow_"

NAMES = (
    "convnext_base", "convnext_nano", "convnext_small", "convnext_tiny", "densenet121", "efficientnet_b0", "hrnet_w18", "mobilenetv3_large_100",
    "regnetx_032", "regnety_032", "resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "seresnet50", "swin_base_patch4_window7_224",
    "swin_small_patch4_window7_224", "swin_tiny_patch4_window7_224", "vgg16", "vgg16_bn", "vit_base_patch16_224", "vit_small_patch16_224",
)  # fmt: skip
"""The backbones that are registered by themselves; register_timm_models takes any other."""

__all__: list[str] = []  # timm writes the names of registered models into it


def register_timm_models(*names: str) -> list[str]:
    """Registers timm's models `names` (default: NAMES) with Interflow, each as "interflow_" + its name; returns those names.

    It is done for NAMES when interflow_vision is imported after timm; importing interflow_vision alone loads no timm. timm.create_model
    then takes the arguments of attach, and `pretrained=True` is the backbone's. ValueError for a name that timm does not have.
    """
    package = timm()
    made = []
    for name in names or NAMES:
        if not package.is_model(name):
            if not names:
                continue  # another version of timm
            raise ValueError(f"timm has no model {name!r}{nearest(name, package.list_models())}")
        full = f"{PREFIX}{name}"
        if not package.is_model(full):
            entry = _entry(name)
            globals()[full] = entry
            package.models.register_model(entry)
        made.append(full)
    return made


def _entry(name: str) -> Callable[..., Any]:
    def create(pretrained: bool = False, *, num_classes: int = 1000, **options: Any) -> Any:
        for word in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm passes all of them on
            if options.get(word) is None:
                options.pop(word, None)
        return attach(name, num_classes, pretrained=pretrained, **options)

    create.__name__ = create.__qualname__ = f"{PREFIX}{name}"
    create.__module__ = __name__
    create.__doc__ = f"timm's {name} with an Interflow head; arguments as interflow_vision.attach."
    return create


if "timm" in sys.modules:
    register_timm_models()
