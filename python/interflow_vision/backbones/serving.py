"""What makes an attached network ready to serve: norms behind plain convolutions folded into them, the head folded, frozen."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from interflow_kernels.modules.plain import is_plain, plain_tensor

from ..models import inference
from . import probing

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def for_inference(network: Any, dtype: torch.dtype | None, channels_last: bool) -> Any:
    """A new network; see InterflowNetwork.for_inference. A norm is folded where the dry run shows that only it reads the convolution's output."""
    ready = inference.copied(network).eval()
    fold_norms(ready)
    ready.head, why = inference.folded_head(ready.head)
    inference.say_what_stays("for_inference", why)
    inference.freeze(ready, dtype, channels_last)
    return ready


@torch.no_grad()
def fold_norms(network: Any) -> list[str]:
    """Puts batch norms into the plain convolutions before them, in place; returns the names of those norms.

    A pair is a convolution and a norm that run once and where the norm takes the very tensor that the convolution gives. All pairs are
    folded, and the maps compared: where they differ by more than rounding (somebody else reads a convolution's output), none is.
    """
    backbone = network.backbone
    size = network.default_cfg["input_size"]
    pairs = _pairs(network, size)
    if not pairs:
        return []
    before = _maps(network, size)
    kept: list[tuple[nn.Module, str, nn.Module]] = []
    for conv_name, norm_name in pairs:
        conv, norm = backbone.get_submodule(conv_name), backbone.get_submodule(norm_name)
        for name, made in ((conv_name, fuse_conv_bn_eval(conv, norm)), (norm_name, nn.Identity().eval())):
            parent, _, child = name.rpartition(".")
            holder = backbone.get_submodule(parent)
            kept.append((holder, child, holder._modules[child]))
            holder._modules[child] = made
    after = _maps(network, size)
    if all(_near(a, b) for a, b in zip(after, before, strict=True)):
        return [norm for _, norm in pairs]
    for holder, child, module in reversed(kept):
        holder._modules[child] = module
    return []


def _pairs(network: Any, size: Any) -> list[tuple[str, str]]:
    """(convolution, norm) by their names in the backbone."""
    given: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no address is used twice
    calls: dict[str, int] = {}
    found: list[tuple[str, str]] = []
    chosen = [(name, m) for name, m in network.backbone.named_modules() if name and (_folds(m) or _norm_folds(m))]

    def note(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(module, nn.Conv2d):
                given[id(output)] = name
                alive.append(output)
            elif id(args[0]) in given:
                found.append((given[id(args[0])], name))

        return hook

    handles = [module.register_forward_hook(note(name, module)) for name, module in chosen]
    try:
        _maps(network, size)
    finally:
        for handle in handles:
            handle.remove()
    fits = [(conv, norm) for conv, norm in found if calls[conv] == calls[norm] == 1]
    return [pair for pair in fits if sum(other[0] == pair[0] for other in found) == 1]


def _folds(module: nn.Module) -> bool:
    return is_plain(module, nn.Conv2d) and plain_tensor(module.weight) and (module.bias is None or plain_tensor(module.bias))


def _norm_folds(module: nn.Module) -> bool:
    return type(module) in _NORMS and is_plain(module, type(module)) and module.running_mean is not None and plain_tensor(module.running_mean)


def _maps(network: Any, size: Any) -> list[Tensor]:
    with probing.undisturbed(network.backbone):
        return [m.clone() for m in network.forward_maps(probing.image(network.backbone, size))]


def _near(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-2 if b.dtype in (torch.bfloat16, torch.float16) else 1e-4
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
