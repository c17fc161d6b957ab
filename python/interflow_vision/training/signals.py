"""What a training logs beside loss and accuracy: the learning rate, and the norm of the gradient of every stage and of the head."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradientNorms(Callback):
    """Logs gradient_norm/stage1, ..., gradient_norm/head, the mean over an epoch's steps, and learning_rate, at each step that is logged.

    The norm is the 2-norm of all gradients of a part before they are clipped, after they were averaged over processes and unscaled. A part
    without gradients (frozen) is left out. A network without stages has its children in place of them.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[nn.Parameter]] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the parts, after the strategy has wrapped or sharded them."""
        self._parts = parts(getattr(pl_module, "model", pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Logs; Lightning keeps the sums on the device, so no step waits."""
        for name, parameters in self._parts.items():
            gradients = [p.grad for p in parameters if p.grad is not None]
            if gradients:
                pl_module.log(f"gradient_norm/{name}", _whole(get_total_norm(gradients)), on_step=False, on_epoch=True, batch_size=1)
        pl_module.log("learning_rate", optimizer.param_groups[-1]["lr"], on_step=True, on_epoch=False, batch_size=1)


def parts(network: nn.Module) -> dict[str, list[nn.Parameter]]:
    """stage1, stage2, ..., by where the features are taken, and head; of a network without such places its children by name."""
    ends = [info["module"] for info in getattr(network, "feature_info", [])]
    if not ends or not all(isinstance(end, str) and end.startswith("features.") for end in ends):
        return {name: list(child.parameters()) for name, child in network.named_children()}
    found: dict[str, list[nn.Parameter]] = {f"stage{i}": [] for i in range(1, len(ends) + 1)}
    found["head"] = []
    stage, trunk = 1, network.get_submodule("features")
    for name, layer in trunk.named_children():
        found[f"stage{min(stage, len(ends))}"] += list(layer.parameters())
        stage += f"features.{name}" in ends
    known = {id(p) for members in found.values() for p in members}
    found["head"] = [p for p in network.parameters() if id(p) not in known]
    return found


def _whole(norm: Any) -> Tensor:
    """The number that a sharded norm stands for."""
    return norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
