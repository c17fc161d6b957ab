"""Steps that make a trained network ready to serve: norms into convolutions; attention, memory format and dtype. No model's own.

They go by what the modules are, not by what a model was built with, and name what they have to leave as it is.
"""

import copy
import warnings
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import type_before_parametrizations

from interflow_kernels import FusedInterflowHead, InterflowHead
from interflow_kernels.modules._twin import COMPUTING, only_read
from interflow_kernels.modules.plain import altered, plain_tensor

from .trunk import Place, Trunk
from .wrappers import unwrapped

M = TypeVar("M", bound=nn.Module)
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
_HEADS = (InterflowHead, FusedInterflowHead)


def copied(model: M) -> M:
    """A deep copy; also of weights that hooks compute (pruning, the old weight norm), which copy.deepcopy refuses: as they are now."""
    memo: dict[int, object] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


@torch.no_grad()
def without_norms(trunk: Trunk) -> tuple[Trunk, list[str]]:
    """The trunk with each norm folded into the convolution before it, and in words what stays.

        W' = W * gamma / sqrt(var + eps),  b' = (b - mean) * gamma / sqrt(var + eps) + beta, with the running mean and variance

    An nn.Identity in a norm's place is dropped. `trunk` is in eval mode; what does not change is taken over, not copied.
    """
    layers: list[tuple[Place, nn.Module]] = []
    stays: list[str] = []
    names: list[str] = []
    for name, place, layer in trunk.placed():
        if place.role == "norm" and layers and layers[-1][0].role == "convolution":
            if type(layer) is nn.Identity and not altered(layer):
                continue
            conv, norm = unwrapped(layers[-1][1]), unwrapped(layer)
            why = _why_not(conv, names[-1], norm)
            if why is None:
                layers[-1] = (layers[-1][0], _fused(conv, norm))
                continue
            stays.append(f"features.{name} ({why})")
        elif any(isinstance(module, _NORMS) for module in layer.modules()):
            stays.append(f"features.{name} (a norm inside {type(layer).__name__})")
        layers.append((place, layer))
        names.append(name)
    return Trunk(layers), stays


def _why_not(conv: nn.Module, conv_name: str, norm: nn.Module) -> str | None:
    """Why the norm cannot be folded into the convolution, or None."""
    kind = type(norm).__name__
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return kind if isinstance(norm, _NORMS) else f"{kind}, no batch norm"
    if altered(norm):
        return f"{kind} with hooks"
    if norm.running_mean is None or norm.running_var is None:
        return f"{kind} without running statistics"
    if type_before_parametrizations(conv) is not nn.Conv2d:
        return f"{kind} behind {type(conv).__name__}"
    if altered(conv, COMPUTING):
        return f"{kind} behind features.{conv_name} with hooks"
    if norm.num_features != conv.out_channels:
        return f"{kind} for {norm.num_features} channels behind {conv.out_channels}"
    held = [conv.weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    if not all(tensor is None or plain_tensor(tensor) for tensor in held):
        return f"{kind} or features.{conv_name} with parameters that are not plain tensors"
    return None


def _fused(conv: nn.Module, norm: nn.Module) -> nn.Conv2d:
    """A new plain convolution that does what both do in eval mode."""
    assert isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    assert norm.running_mean is not None and norm.running_var is not None
    fused = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        padding_mode=conv.padding_mode,
        device="meta",
    )
    with only_read(conv):  # its weight may be computed: by a parametrization, or by the hook of pruning or of the older weight norm
        fused.weight, fused.bias = fuse_conv_bn_weights(conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return fused.requires_grad_(any(parameter.requires_grad for parameter in conv.parameters())).eval()


def folded_head(head: nn.Module) -> tuple[nn.Module, list[str]]:
    """An Interflow head with its norm, and its attention where it is linear, folded into the weight, any other as it is; and in words why one stays.

    A head that can be folded and stays, and a norm that stays in another head, are named.
    """
    inside = unwrapped(head)
    foldable = [module for module in head.modules() if isinstance(module, InterflowHead) and (module.attention != "gated" or module.norm is not None)]
    if not foldable:
        return head, [f"head.{name} ({type(module).__name__})" for name, module in head.named_modules() if isinstance(module, _NORMS)]
    if foldable[0] is not inside or type_before_parametrizations(inside) not in _HEADS:
        return head, [f"head ({type(head).__name__})"]
    if altered(inside, COMPUTING):
        return head, [f"head ({type(inside).__name__} with hooks)"]
    if not all(plain_tensor(tensor) for tensor in [*inside.parameters(), *inside.buffers()]):
        return head, [f"head ({type(inside).__name__} with parameters that are not plain tensors)"]
    norm = foldable[0].norm
    if norm is not None:
        why = "with hooks" if altered(norm) else None
        if not isinstance(norm, (nn.BatchNorm1d, nn.SyncBatchNorm)) or norm.running_mean is None or norm.running_var is None:
            why = "no batch norm with running statistics"
        if why is not None:
            return head, [f"head.norm ({type(norm).__name__}, {why})"]
    return foldable[0].without_norm() if foldable[0].attention == "gated" else foldable[0].fold(), []


def say_what_stays(step: str, stays: Iterable[str]) -> None:
    """One warning that names it all, or none."""
    named = ", ".join(stays)
    if named:
        warnings.warn(f"{step} leaves as it is what it cannot fold: {named}", stacklevel=3)


def freeze(model: nn.Module, dtype: torch.dtype | None, channels_last: bool) -> None:
    """No gradients, one memory format, and `dtype` unless it is None. Raises TypeError for a dtype that is not floating point."""
    if dtype is not None:
        if not dtype.is_floating_point:
            raise TypeError(f"dtype must be floating point or None, got {dtype}")
        model.to(dtype)
    model.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)  # type: ignore[call-overload]
    model.requires_grad_(False)
