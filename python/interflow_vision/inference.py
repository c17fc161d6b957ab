"""A trained network made ready to serve: norms folded into convolutions, the attention into the head, memory format and dtype."""

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from interflow_kernels import InterflowHead

if TYPE_CHECKING:
    from .vgg import VGG


@torch.no_grad()
def fused(model: "VGG") -> "VGG":
    """A new network in eval mode whose batch norms are part of the convolutions before them; without any, a copy.

    W' = W * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta, with the running mean and variance
    """
    if not model.batch_norm:
        return copy.deepcopy(model).eval()
    plain = model.rebuilt(batch_norm=False)
    plain.head = copy.deepcopy(model.head)
    weight = next(model.features.parameters())
    plain.to(device=weight.device, dtype=weight.dtype)
    given = list(model.features.values())
    targets = [layer for layer in plain.features.values() if isinstance(layer, nn.Conv2d)]
    sources = [(layer, given[i + 1]) for i, layer in enumerate(given) if isinstance(layer, nn.Conv2d)]
    for target, (conv, norm) in zip(targets, sources, strict=True):
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        w, b = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        target.weight.copy_(w)
        assert target.bias is not None
        target.bias.copy_(b)
    return plain.eval()


def for_inference(model: "VGG", dtype: torch.dtype | None, channels_last: bool) -> "VGG":
    """A new network to serve with: `fused`, the head folded where it is linear, frozen, in one memory format and dtype."""
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype must be floating point or None, got {dtype}")
    ready = fused(model)
    if isinstance(ready.head, InterflowHead) and ready.head.attention != "gated":
        ready.head = ready.head.fold()
    if dtype is not None:
        ready.to(dtype)
    ready.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    return ready.requires_grad_(False)
