"""From a classifier's options to its network, where that is a backbone of timm or torchvision."""

from collections.abc import Mapping
from typing import Any

from ..backbones import InterflowNetwork, attach


def create_backbone(
    backbone: str,
    options: Mapping[str, Any] | None,
    name: str,
    attention: str,
    num_classes: int,
    head: str,
    *,
    stage: str,
    width: float,
    stages: list[int] | None,
    in_channels: int,
    pool5: bool,
    pool_size: int,
    **head_options: Any,
) -> InterflowNetwork:
    """attach(backbone, ...) from what create_model would get; `name`, `width` and `pool5` are VGG's own and do not count.

    options: further ones of timm.create_model or torchvision's get_model. Weights are new; load_pretrained brings others.
    Raises what attach raises.
    """
    given = dict(options or {})
    if "pretrained" in given:
        raise ValueError("backbone_options must not have 'pretrained': give --model.pretrained true")
    if in_channels != 3:
        if backbone.startswith("torchvision/"):
            raise ValueError(f"in_channels must be 3 for {backbone}, got {in_channels}; backbones of timm take other numbers")
        given.setdefault("in_chans", in_channels)
    fitting = {key: value for key, value in head_options.items() if value is not None}
    return attach(backbone, num_classes, attention=attention, stages=stages, head=head, pool_size=pool_size, stage_end=stage, **fitting, **given)
