"""How a network is trained: optimiser and schedule by name, which parameters decay, and how fast the trunk learns."""

import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from interflow_kernels import InterflowHead

from ..backbones import InterflowNetwork
from ..errors import MissingPackageError

SCHEDULES = ("one_cycle", "cosine", "step", "constant")


def one_cycle(progress: float, warmup: float, start: float = 0.04, end: float = 0.001) -> float:
    """The learning rate's factor at `progress` in [0, 1]: cosine from `start` to 1 in the first `warmup`, then cosine to `end`.

    torch's OneCycleLR cannot go on when a resumed run gets more epochs; a factor of progress can.
    """
    if progress < warmup:
        return 1 + (start - 1) * (1 + math.cos(math.pi * progress / warmup)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2


@dataclass(frozen=True)
class Settings:
    """How the weights move.

    lr: the highest learning rate.  momentum: of SGD, and of timm's optimisers that have one.
    warmup: the part of the training in which the learning rate rises.
    optimizer: "sgd" (Nesterov), "adamw", or a name of timm's.  schedule: one of SCHEDULES.
    step_at: parts of the training after which schedule="step" divides by ten.
    trunk_lr: the trunk's learning rate is so many times the head's; 0 freezes it.
    """

    lr: float
    momentum: float
    weight_decay: float
    warmup: float
    optimizer: str = "sgd"
    schedule: str = "one_cycle"
    step_at: tuple[float, ...] = (0.5, 0.75)
    trunk_lr: float = 1.0

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if not (math.isfinite(self.trunk_lr) and self.trunk_lr >= 0):
            raise ValueError(f"trunk_lr must be a finite number, at least 0, got {self.trunk_lr}")
        if not all(0 < part < 1 for part in self.step_at) or list(self.step_at) != sorted(self.step_at):
            raise ValueError(f"step_at must be rising parts of the training, between 0 and 1, got {list(self.step_at)}")

    def factor(self, progress: float) -> float:
        """Of the learning rate at `progress` in [0, 1]."""
        if self.schedule == "one_cycle":
            return one_cycle(progress, self.warmup)
        if progress < self.warmup:  # linear
            return max(progress / self.warmup, 1e-3)
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup)))) / 2
        return 0.1 ** sum(progress >= part for part in self.step_at) if self.schedule == "step" else 1.0


def decayed(model: nn.Module) -> list[nn.Parameter]:
    """Convolutions' and fully connected weights; not biases (the head's [n, K] neither), norms and the attention."""
    heads = [module for module in model.modules() if isinstance(module, InterflowHead)]  # whatever wraps them
    left = {id(p) for head in heads for name, p in head.named_parameters() if name in head.no_weight_decay()}
    for network in model.modules():
        if isinstance(network, InterflowNetwork):  # position embeddings and the like; attention blocks of a backbone are weights as others are
            named = network.no_weight_decay()
            left |= {id(p) for name, p in network.named_parameters() if name in named}
    return [p for p in model.parameters() if p.dim() > 1 and id(p) not in left]


def trunk_modules(model: nn.Module) -> Iterator[nn.Module]:
    """What of a classifier's network is not its head."""
    yield from (child for name, child in model.named_children() if name != "head")


def freeze_trunk(model: nn.Module) -> None:
    """The trunk's weights get no gradients from here on."""
    for module in trunk_modules(model):
        module.requires_grad_(False)


def _groups(module: nn.Module, settings: Settings) -> list[dict[str, Any]]:
    """Parameters that learn, by decay and, where the trunk has a rate of its own, by trunk and head."""
    decays = {id(p) for p in decayed(module)}
    network = getattr(module, "model", module)
    slow = {id(p) for part in trunk_modules(network) for p in part.parameters()} if settings.trunk_lr != 1 else set()
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = []
    for scale, chosen in ((settings.trunk_lr, lambda p: id(p) in slow), (1.0, lambda p: id(p) not in slow)):
        for decay in (True, False):
            members = [p for p in parameters if chosen(p) and (id(p) in decays) == decay]
            if members:
                groups.append({"params": members, "weight_decay": settings.weight_decay if decay else 0.0, "lr_scale": scale, "decays": decay})
    return groups


def scheduled(model: nn.Module, settings: Settings, steps: int) -> LambdaLR:
    """The schedule of `steps` steps, with its optimizer; MissingPackageError, ValueError where there is no such optimizer."""
    groups = _groups(model, settings)
    for group in groups:
        group["lr"] = settings.lr * group["lr_scale"]
    return LambdaLR(_optimizer(groups, settings), lambda step: settings.factor(step / steps))


def _optimizer(groups: list[dict[str, Any]], settings: Settings) -> Optimizer:
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr)
    try:
        from timm.optim import create_optimizer_v2, list_optimizers
    except Exception as error:  # missing, or built for another torch
        raise MissingPackageError(f"optimizer {settings.optimizer!r} needs timm, which is not installed: take sgd or adamw, or pip install timm") from error
    names: Sequence[str] = list_optimizers()
    if settings.optimizer not in names:
        near = difflib.get_close_matches(settings.optimizer, names, n=1)
        raise ValueError(f"optimizer must be sgd, adamw or one of timm's, got {settings.optimizer!r}" + (f" (did you mean {near[0]}?)" if near else ""))
    made: Optimizer = create_optimizer_v2(groups, opt=settings.optimizer, lr=settings.lr, momentum=settings.momentum)
    return made


def apply(settings: Settings, schedule: LambdaLR) -> None:
    """Puts the settings in place of those that a checkpoint has brought into the schedule and its optimizer."""
    groups = schedule.optimizer.param_groups
    factors: list[Callable[[int], float]] = schedule.lr_lambdas
    schedule.base_lrs = [settings.lr * group["lr_scale"] for group in groups]
    for group, base, factor in zip(groups, schedule.base_lrs, factors, strict=True):
        group.update(weight_decay=settings.weight_decay if group["decays"] else 0.0, initial_lr=base)
        if settings.optimizer == "sgd":
            group.update(momentum=settings.momentum, nesterov=settings.momentum > 0)
        group["lr"] = base * factor(schedule.last_epoch)
