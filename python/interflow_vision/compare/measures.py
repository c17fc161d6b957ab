"""What is measured in a run: gradient norms of the convolutions, the curves, accuracy on the training images; and a start that equalises branches."""

import copy
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from interflow_kernels import InterflowHead

from ..models.wrappers import unwrapped


def convolutions(module: nn.Module) -> dict[str, nn.Conv2d]:
    """The convolutions by name, from the image on."""
    return {name: each for name, each in module.named_modules() if isinstance(each, nn.Conv2d)}


def gradient_norms(module: nn.Module) -> list[float]:
    """The L2 norm of the gradient of each convolution's weight."""
    norms = [torch.zeros(()) if conv.weight.grad is None else conv.weight.grad.norm().float().cpu() for conv in convolutions(module).values()]
    return torch.stack(norms).tolist()


class Measurements(Callback):
    """Collects while a run trains, and goes along in its checkpoints.

    start: gradient norms in the first step, before any weight has changed; gradients: those in the last step of each epoch; epochs: what
    Classifier logged in each; seconds: of the epochs' training steps.
    """

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {"start": [], "gradients": [], "epochs": [], "seconds": 0.0}
        self._began = 0.0  # time.perf_counter

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the optimiser's step."""
        if trainer.global_step == 0 and not self.kept["start"]:
            self.kept["start"] = gradient_norms(pl_module)
        if trainer.is_last_batch:
            self.kept["gradients"].append(gradient_norms(pl_module))

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_last_batch:
            self.kept["seconds"] += time.perf_counter() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation has been."""
        self.kept["epochs"].append({name: float(value) for name, value in sorted(trainer.callback_metrics.items())})

    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.kept = copy.deepcopy(state_dict)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, target: Tensor, batch: int = 256) -> float:
    """Fraction of right answers in eval mode, on images as they are, without augmentation."""
    device = next(model.parameters()).device
    model.eval()
    right = 0
    for x, y in zip(images.split(batch), target.split(batch), strict=True):
        right += int((model(x.to(device)).argmax(1).cpu() == y).sum())
    return right / len(target)


@torch.no_grad()
def equalise(model: Any, images: Tensor) -> None:
    """Another start than a norm's: each branch's scores get mean 0 and the standard deviation of the last one's over `images`.

    W_i and b_i are scaled by std(z_n) / std(z_i), each std over images and averaged over classes, then b_i loses the mean of z_i. ValueError for
    a model whose head is no InterflowHead.
    """
    head = unwrapped(model.head)
    if not isinstance(head, InterflowHead):
        raise ValueError(f"start: equal is for Interflow heads, got {type(head).__name__}")
    z = copy.deepcopy(model).train().forward_branches(images)[1].double()  # [B, n, K]; in training mode, as the first step will see it
    scale = z.std(0).mean(1)  # [n]
    scale = scale[-1] / scale
    assert head.bias is not None
    for i, factor in enumerate(scale.tolist()):
        head.branch_weight(i).mul_(factor)
        head.bias[i] = head.bias[i] * factor - z[:, i].mean(0) * factor
