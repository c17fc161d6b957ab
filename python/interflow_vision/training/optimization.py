"""How a network is trained: SGD with Nesterov momentum, which parameters decay, and one cycle of the learning rate."""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from interflow_kernels import InterflowHead

from ..backbones import InterflowNetwork


def one_cycle(progress: float, warmup: float, start: float = 0.04, end: float = 0.001) -> float:
    """The learning rate's factor at `progress` in [0, 1]: cosine from `start` to 1 in the first `warmup`, then cosine to `end`.

    torch's OneCycleLR cannot go on when a resumed run gets more epochs; a factor of progress can.
    """
    if progress < warmup:
        return 1 + (start - 1) * (1 + math.cos(math.pi * progress / warmup)) / 2
    return end + (1 - end) * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2


@dataclass(frozen=True)
class Settings:
    """lr: the highest learning rate; warmup: the part of the training in which it rises."""

    lr: float
    momentum: float
    weight_decay: float
    warmup: float


def decayed(model: nn.Module) -> list[nn.Parameter]:
    """Convolutions' and fully connected weights; not biases (the head's [n, K] neither), norms and the attention."""
    heads = [module for module in model.modules() if isinstance(module, InterflowHead)]  # whatever wraps them
    left = {id(p) for head in heads for name, p in head.named_parameters() if name in head.no_weight_decay()}
    for network in model.modules():
        if isinstance(network, InterflowNetwork):  # position embeddings and the like; attention blocks of a backbone are weights as others are
            named = network.no_weight_decay()
            left |= {id(p) for name, p in network.named_parameters() if name in named}
    return [p for p in model.parameters() if p.dim() > 1 and id(p) not in left]


def sgd_one_cycle(model: nn.Module, settings: Settings, steps: int) -> LambdaLR:
    """The schedule of `steps` steps, with its optimizer."""
    chosen = decayed(model)
    known = {id(p) for p in chosen}
    rest = [p for p in model.parameters() if id(p) not in known]
    groups = [{"params": chosen, "weight_decay": settings.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)
    return LambdaLR(optimizer, lambda step: one_cycle(step / steps, settings.warmup))


def apply(settings: Settings, schedule: LambdaLR) -> None:
    """Puts the settings in place of those that a checkpoint has brought into the schedule and its optimizer."""
    groups = schedule.optimizer.param_groups
    schedule.base_lrs = [settings.lr] * len(groups)
    for group, decay, factor in zip(groups, (settings.weight_decay, 0.0), schedule.lr_lambdas, strict=True):
        group.update(weight_decay=decay, momentum=settings.momentum, nesterov=settings.momentum > 0, initial_lr=settings.lr)
        group["lr"] = settings.lr * factor(schedule.last_epoch)
