"""The parameters of a network by depth: learning rates for each stage, what decays, and what is frozen."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_HEADS_OWN = ("head.bias", "head.attention_weight", "head.attention_bias")


def depth_of(network: Any) -> dict[str, int]:
    """Parameter name -> 0 up to the end of the first stage, ..., n for the head. In the backbone's order, which is that of depth.

    A parameter belongs to the first stage whose module it lies in or before; one behind the last stage's end to the last.
    Where stages have no names among the backbone's modules, all of the backbone is one group.
    """
    names = [name for name, _ in network.named_parameters()]
    ends = [_last_below(stage.name, names) for stage in network.stages]
    found: dict[str, int] = {}
    last = len(network.stages) - 1
    for place, name in enumerate(names):
        if not name.startswith("backbone."):
            found[name] = last + 1
        else:
            found[name] = next((i for i, end in enumerate(ends) if end is not None and place <= end), last)
    return found


def _last_below(stage: str, names: list[str]) -> int | None:
    """The place of the last parameter below a stage's module; timm's extractors write "layers_0" for "layers.0"."""
    for spelling in (stage, stage.replace(".", "_"), f"model.{stage}", f"body.{stage}"):
        below = [i for i, name in enumerate(names) if name.startswith((f"backbone.{spelling}.", f"backbone.{spelling}_"))]
        if below:
            return below[-1]
    return None


def no_weight_decay(network: Any) -> set[str]:
    """The names, of parameters that exist."""
    named = set(_HEADS_OWN)
    for path, module in network.backbone.named_modules():
        told = getattr(module, "no_weight_decay", None)
        if callable(told):
            prefix = f"backbone.{path}." if path else "backbone."
            named |= {prefix + name for name in told()}
    return named & {name for name, _ in network.named_parameters()}


def matcher(network: Any) -> Callable[[str], tuple[int]]:
    """Parameter name -> (depth,)."""
    depth = depth_of(network)
    last = len(network.stages)
    return lambda name: (depth.get(name, last if name.startswith("head") else last - 1),)


def parameter_groups(network: Any, lr: float, *, backbone_lr: float | None, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer: the head with `lr`; stage i of n with backbone_lr * layer_decay ** (n - 1 - i).

    backbone_lr: of the last stage, `lr` by default.  layer_decay: factor from a stage to the one before it.  weight_decay:
    of weights; biases, norms, the attention and what the backbone names have none. Frozen parameters are left out.
    Each group has "params", "lr", "weight_decay" and "name". Raises ValueError for a rate that is not above 0.
    """
    for name, value in (("lr", lr), ("backbone_lr", lr if backbone_lr is None else backbone_lr), ("layer_decay", layer_decay)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    depth, still, n = depth_of(network), no_weight_decay(network), len(network.stages)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        level, decays = depth[name], parameter.dim() > 1 and name not in still
        if (level, decays) not in groups:
            rate = lr if level == n else (lr if backbone_lr is None else backbone_lr) * layer_decay ** (n - 1 - level)
            label = "head" if level == n else f"stage {level + 1}"
            decay, label = (weight_decay, label) if decays else (0.0, f"{label}, no decay")
            groups[level, decays] = {"params": [], "lr": rate, "weight_decay": decay, "name": label}
        groups[level, decays]["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def freeze(network: Any, stages: int | None) -> None:
    """The first `stages` stages, None for the whole backbone; the others of the backbone are thawed."""
    n = len(network.stages)
    if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or not 0 <= stages <= n):
        raise ValueError(f"stages must be a number from 0 to {n}, or None for the whole backbone, got {stages!r}")
    network._frozen = n if stages is None else stages
    depth = depth_of(network)
    for name, parameter in network.named_parameters():
        if depth[name] < n:
            parameter.requires_grad_(depth[name] >= network._frozen)
    network.train(network.training)


def keep_norms_still(network: Any) -> None:
    """Norms of frozen stages into eval mode, so that their statistics stay."""
    depth = depth_of(network)
    for path, module in network.backbone.named_modules():
        if isinstance(module, _NormBase):
            own = [f"backbone.{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if own and all(depth[name] < network._frozen for name in own):
                nn.Module.train(module, False)
