"""Steps that make a trained network ready to serve: norms into convolutions; attention, memory format and dtype. No model's own."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from interflow_kernels import InterflowHead


@torch.no_grad()
def fold_norms(layers: Sequence[nn.Module], targets: Sequence[nn.Conv2d]) -> None:
    """Writes each convolution of `layers`, folded with the batch norm behind it, into the target of its place.

    W' = W * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta, with the running mean and variance
    """
    pairs = [(layer, layers[i + 1]) for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    for target, (conv, norm) in zip(targets, pairs, strict=True):
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        w, b = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
        target.weight.copy_(w)
        assert target.bias is not None
        target.bias.copy_(b)


def folded_head(head: nn.Module) -> nn.Module:
    """An Interflow head with its attention folded into the weight where it is linear; any other as it is."""
    return head.fold() if isinstance(head, InterflowHead) and head.attention != "gated" else head


def freeze(model: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> None:
    """No gradients, one memory format, and `dtype` unless it is None. Raises TypeError for a dtype that is not floating point."""
    if dtype is not None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point or None, got {dtype}")
        model.to(dtype)
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    model.requires_grad_(False)
