"""Parameters of a backbone that its maps do not depend on: DDP waits for their gradients in vain unless it is told."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import probing


def unreached(backbone: nn.Module, features: Sequence[Tensor]) -> list[str]:
    """Names of parameters that ask for a gradient and that backward from `features` does not reach."""
    seen: set[Any] = set()
    reached: set[int] = set()
    road = [x.grad_fn for x in features if x.grad_fn is not None]
    while road:
        node = road.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            reached.add(id(variable))
        road.extend(following for following, _ in node.next_functions if following is not None)
    return [name for name, p in backbone.named_parameters() if p.requires_grad and id(p) not in reached]


def names(network: Any) -> list[str]:
    """The same from a dry run: no weight or statistic changes, and no gradient is computed."""
    size = network.default_cfg["input_size"]
    with probing.undisturbed(network.backbone), torch.enable_grad():
        features = network.forward_features(probing.image(network.backbone, size))
    return [f"backbone.{name}" for name in unreached(network.backbone, features)]


def warn_where_distributed(backbone: nn.Module, features: Sequence[Tensor]) -> bool:
    """Once, in the first training forward of several processes: which parameters stay without a gradient, and what to do. Whether it has asked."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return False
    idle = unreached(backbone, features)
    if idle and not any(hasattr(p, "device_mesh") for p in backbone.parameters()):  # FSDP2's shards do not wait for each other's gradients
        shown = ", ".join(idle[:3]) + (f", ... ({len(idle)} in all)" if len(idle) > 3 else "")
        remedy = "give DistributedDataParallel find_unused_parameters=True, or freeze them with requires_grad_(False) before wrapping"
        warnings.warn(f"the maps do not depend on these parameters of the backbone: {shown}; {remedy}", stacklevel=3)
    return True
