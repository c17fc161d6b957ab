"""Ends of a backbone's stages that compute the mean with the map: found by a dry run, put in, and kept only if the network stays the same.

A stage's end is replaced where its map is exactly what a ReLU gives. Where the module around that ReLU adds two maps and
puts the sum into it, as residual blocks do, that module's own forward is traced (its submodules are not), and the addition
goes into the same pass. In a graph that torch.fx made of a whole backbone the same is done at the node of the map. Then the
dry run is repeated: every map must be what it was, each mean that of its map, and state_dict the same; else all is undone.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from interflow_kernels.modules.plain import altered, is_plain

from . import graph_ends, probing
from .exchange import Exchange
from .mean_relu import MeanReLU
from .network import InterflowNetwork
from .readers import Catch

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass
class _Change:
    """A replaced submodule: `parent`'s child `name`, what stood there, and in words what stands there now."""

    parent: nn.Module
    name: str
    before: nn.Module
    said: str

    def undo(self) -> None:
        self.parent._modules[self.name] = self.before


def install(network: InterflowNetwork, seen: probing.Seen) -> None:
    """Replaces what can be replaced in the network's backbone, in place, and writes it into network.replaced.

    seen: of the dry run, whose maps are those of the network's stages.
    """
    backbone, exchange = network.backbone, network._exchange
    size = network.default_cfg["input_size"]
    like = next(backbone.parameters(), None)
    keys = list(backbone.state_dict())
    changes: dict[int, Any] = {}
    if isinstance(backbone, fx.GraphModule):
        changes = graph_ends.replace_in_backbone(backbone, [stage.name for stage in network.stages], exchange)
    else:
        for i, m in enumerate(seen.maps):
            if network.head_name == "last" and i + 1 < len(seen.maps):
                continue  # nobody wants its mean
            change = _replace(backbone, seen, i, m, exchange)
            if change is not None:
                changes[i] = change
    if not changes:
        return
    network.fused_stages = frozenset(changes)
    meta = like is not None and like.device.type == "meta"  # no numbers to compare
    wrong = frozenset() if meta else _wrong(network, seen.maps, size)
    if wrong and not isinstance(backbone, fx.GraphModule):
        for i in wrong & changes.keys():
            changes.pop(i).undo()
        network.fused_stages = frozenset(changes)
        wrong = _wrong(network, seen.maps, size)
    if wrong or list(backbone.state_dict()) != keys:
        for change in changes.values():
            change.undo()
        network.fused_stages = frozenset()
        return
    network.replaced = {network.stages[i].name: change.said for i, change in changes.items()}


def _wrong(network: InterflowNetwork, maps: Sequence[Tensor], size: Sequence[int]) -> frozenset[int]:
    """The stages whose map the dry run does not give again, to rounding, and those that were replaced and do not give its mean with it."""
    found: set[int] = set()
    with probing.undisturbed(network.backbone):
        given, parcel = network._maps(probing.image(network.backbone, size))
        for i, (new, old) in enumerate(zip(given, maps, strict=True)):
            good = _close(new, old)
            if good and i in network.fused_stages:
                offered = parcel.get(("mean", i))
                good = offered is not None and offered.map is new and offered.untouched() and _close(offered.mean, old.double().mean((2, 3)))
            if not good:
                found.add(i)
    return frozenset(found)


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    tolerance = _TOLERANCE.get(b.dtype if b.dtype in _TOLERANCE and a.dtype == b.dtype else a.dtype, 1e-5)
    bound = tolerance * max(1e-6, float(b.abs().max())) if b.numel() else 0.0
    return bool(((a.double() - b.double()).abs() <= bound).all())


def _replace(backbone: nn.Module, seen: probing.Seen, stage: int, m: Tensor, exchange: Exchange) -> _Change | None:
    """Replaces the end of one stage, or nothing."""
    if m.dim() != 4:
        return None
    modules = dict(backbone.named_modules())
    givers = [name for name, outputs in seen.outputs.items() if name and len(outputs) == 1 and outputs[0] is m]
    for name in sorted(givers, key=lambda each: -each.count(".")):  # the innermost first
        module = modules[name]
        if _plain_relu(module):
            continue
        made = _block(module, exchange, stage)
        if made is not None:
            parent = backbone.get_submodule(name.rpartition(".")[0])
            parent._modules[name.rpartition(".")[2]] = made
            return _Change(parent, name.rpartition(".")[2], module, f"addition and ReLU of {name}")
    for name in givers:
        module = modules[name]
        if _plain_relu(module):
            parent = backbone.get_submodule(name.rpartition(".")[0])
            relu = MeanReLU(exchange, stage, bool(module.inplace)).train(module.training)
            relu._forward_hooks.update(module._forward_hooks)
            parent._modules[name.rpartition(".")[2]] = relu
            return _Change(parent, name.rpartition(".")[2], module, f"ReLU {name}")
    return None


def _block(module: nn.Module, exchange: Exchange, stage: int) -> nn.Module | None:
    """A module that does what a residual block does, with its addition and ReLU in one pass; None where it is not exactly one."""
    if type(module).__module__.startswith("torch.nn") or isinstance(module, fx.GraphModule):
        return None
    with _without_catches(module):
        if altered(module):
            return None
        made = graph_ends.block_with_mean(module, exchange, stage)
    if made is not None:
        made._forward_hooks.update(module._forward_hooks)
    return made


def _plain_relu(module: nn.Module) -> bool:
    with _without_catches(module):
        return is_plain(module, nn.ReLU)


@contextmanager
def _without_catches(module: nn.Module) -> Iterator[None]:
    """Inside it the module is without our own hooks, which read its output and change nothing."""
    kept = module._forward_hooks
    if any(not isinstance(hook, Catch) for hook in kept.values()):
        yield
        return
    module._forward_hooks = type(kept)()
    try:
        yield
    finally:
        module._forward_hooks = kept
