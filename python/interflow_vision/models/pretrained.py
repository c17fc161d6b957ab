"""torchvision's weights for the trunk of a VGG: taken from a state_dict, or downloaded by torchvision."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import require_torchvision


def take_torchvision_weights(features: nn.Module, batch_norm: bool, state_dict: Mapping[str, Tensor]) -> None:
    """Puts the convolutions (and batch norms) of torchvision's VGG-16 of the same kind into a trunk; ValueError where they do not fit."""
    given = {key.removeprefix("features."): value for key, value in state_dict.items() if key.startswith("features.")}
    own = features.state_dict()
    odd = sorted(set(given) ^ set(own), key=lambda key: int(key.split(".")[0]))
    if odd:
        what = "lack" if odd[0] in own else "have"
        kind = "vgg16_bn" if batch_norm else "vgg16"
        raise ValueError(f"torchvision's weights {what} features.{odd[0]}, unlike this model; it needs those of torchvision's {kind}")
    for key, value in own.items():
        if given[key].shape != value.shape:
            shapes = f"torchvision's features.{key} is {list(given[key].shape)}, this model's {list(value.shape)}"
            raise ValueError(f"{shapes}; pretrained weights need width=1 and in_channels=3")
    features.load_state_dict(given)


def imagenet_weights(batch_norm: bool) -> Mapping[str, Any]:
    """The state_dict of torchvision's VGG-16 trained on ImageNet; MissingPackageError without torchvision."""
    torchvision = require_torchvision("pretrained=True")
    name = "VGG16_BN_Weights" if batch_norm else "VGG16_Weights"
    weights: Mapping[str, Any] = torchvision.models.get_weight(f"{name}.IMAGENET1K_V1").get_state_dict(progress=True)
    return weights
