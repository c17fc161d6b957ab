"""What the fused parts cost beside plain PyTorch, each checked to give the same before it is timed."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interflow_kernels import FusedInterflowHead, StageTap

from ..models.vgg import VGG
from .timing import Timing, interleaved

ROUNDS = 20
CLASSES, BATCH = 1000, 8
SIDES = ((128, 112), (256, 56), (512, 28), (512, 14))
"""Channels and side of the four stage features of VGG-16 at 224x224."""
SHAPES = f"{BATCH} images, maps of VGG-16 at 224 pixels: {', '.join(f'{c}x{s}x{s}' for c, s in SIDES)}; {CLASSES} classes"


def time_parts(device: str) -> dict[str, dict[str, Timing]]:
    """The head alone and the stages' ends alone, in plain PyTorch and fused: part -> {"plain", "fused"} -> time."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(BATCH, c, side, side, generator=generator).to(device).requires_grad_() for c, side in SIDES]
    dy = torch.randn(BATCH, CLASSES, generator=generator).to(device)
    fused = FusedInterflowHead([c for c, _ in SIDES], CLASSES).to(device)
    heads = {"plain": fused.to_eager(), "fused": fused}  # the same parameters
    ends = {"plain": _plain_ends, "fused": _tapped_ends}

    def head_both_ways(name: str) -> list[Tensor]:
        y = heads[name](maps)
        return [y, *torch.autograd.grad(y, [*maps, *fused.parameters()], dy)]

    def ends_both_ways(name: str) -> list[Tensor]:
        outputs = ends[name](maps)
        return [*outputs, *torch.autograd.grad(outputs, maps, [torch.ones_like(x) for x in outputs])]

    parts: dict[str, tuple[Callable[..., Any], bool]] = {
        "head, forward": (lambda name: heads[name](maps), False),
        "head, forward + backward": (head_both_ways, True),
        "ends of stages, forward": (lambda name: ends[name](maps), False),
        "ends of stages, forward + backward": (ends_both_ways, True),
    }
    return {title: _compared(run, with_graph) for title, (run, with_graph) in parts.items()}


def _compared(run: Callable[[str], Any], with_graph: bool) -> dict[str, Timing]:
    with torch.set_grad_enabled(with_graph):
        torch.testing.assert_close(run("fused"), run("plain"), rtol=1e-3, atol=1e-4)
        return interleaved({name: partial(run, name) for name in ("plain", "fused")}, ROUNDS)


def _plain_ends(maps: list[Tensor]) -> list[Tensor]:
    """ReLU, max-pool and mean of each map."""
    rectified = [F.relu(u) for u in maps]
    return [*(F.max_pool2d(v, 2, 2) for v in rectified), *(v.mean((2, 3)) for v in rectified)]


def _tapped_ends(maps: list[Tensor]) -> list[Tensor]:
    tap = StageTap()
    pooled, means = zip(*(tap(u) for u in maps), strict=True)
    return [*pooled, *means]


def time_train_steps(model: VGG, device: str) -> dict[str, Timing]:
    """A training step of 64 images: the network without Interflow, with Interflow in plain PyTorch, and as it is."""
    fused = model.to(device).train()
    naive = fused.rebuilt(stage="eager", head="eager").to(device).train()
    naive.load_state_dict(fused.state_dict())
    plain = fused.rebuilt(stage="eager", head="last", stages=None).to(device).train()
    plain.features.load_state_dict(fused.features.state_dict())
    x, target = torch.randn(64, fused.in_channels, 32, 32, device=device), torch.arange(64, device=device) % fused.num_classes
    torch.testing.assert_close(fused(x), naive(x), rtol=1e-3, atol=1e-3)
    nets = {"VGG-16 without Interflow": plain, "with Interflow, plain PyTorch": naive, "with Interflow, fused": fused}
    optimizers = {name: torch.optim.SGD(net.parameters(), lr=1e-3) for name, net in nets.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        F.cross_entropy(nets[name](x), target).backward()
        optimizers[name].step()

    return interleaved({name: partial(step, name) for name in nets}, ROUNDS)
