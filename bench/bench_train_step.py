"""Whole networks: VGG-16 with Interflow, fused and in plain PyTorch, against the plain VGG-16; inference and a training step."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals, peers
from harness.case import Case, Kind, Plan, Provider
from harness.inputs import DTYPES, FORMATS
from harness.memory import saved_bytes
from harness.run import Session
from torch import Tensor, nn

import interflow_vision

CLASSES = 10
NETWORKS: dict[str, tuple[Kind, dict[str, str]]] = {
    "Interflow fused": ("ours", {"head": "fused", "stage": "fused"}),
    "Interflow naive": ("peer", {"head": "eager", "stage": "eager"}),
    "plain": ("base", {"head": "last", "stage": "eager"}),
}
NO_BRANCHES = "fused, no branches"  # the plain network whose max-pools are taps: what the branches and the head cost on top
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1}
"""Of logits and gradients of 13 convolutions, which sum and round in another order behind the tap's bias. Seen on a CPU in bf16: 0.05."""


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    yield from gpu_plans(device) if device.type == "cuda" and not full else cpu_plans(full, device)


def gpu_plans(device: torch.device) -> Iterator[Plan]:
    """bf16, channels_last, 224 pixels: bound by memory and arithmetic; 32 pixels: bound by launches. goals.gpu_network has the goals."""
    for model, compiled in (("vgg16", False), ("vgg16_bn", False), ("vgg16", True)):
        for direction in ("training step", "inference"):
            yield plan(model, direction, 224, 32, 1.0, "channels_last", compiled, device, 3, dtype="bf16", classes=1000)
    yield plan("vgg16", "training step", 32, 128, 1.0, "channels_last", False, device, 2, dtype="bf16")
    yield plan("vgg16", "inference", 32, 128, 1.0, "channels_last", False, device, 1, dtype="bf16", graph=True)


def cpu_plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """What a CPU's targets are set on; with `full` everything, on any device."""
    # model, pass, pixels, batch, width, layout, compiled, seconds
    yield plan("vgg16", "training step", 32, 64, 1.0, "nchw", False, device, 32)
    yield plan("vgg16", "inference", 32, 64, 1.0, "nchw", False, device, 8)
    yield plan("vgg16_bn", "training step", 32, 64, 0.25, "nchw", False, device, 6)
    if not full:
        return
    for model in ("vgg16", "vgg16_bn"):
        for direction in ("training step", "inference"):
            for layout in FORMATS:
                for compiled in (False, True):
                    if (model, layout, compiled) != ("vgg16", "nchw", False):  # those of the quick set
                        yield plan(model, direction, 32, 64, 1.0, layout, compiled, device, 60)
                    for batch in (1, 4):
                        yield plan(model, direction, 224, batch, 1.0, layout, compiled, device, 60)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


def plan(
    model: str,
    direction: str,
    pixels: int,
    batch: int,
    width: float,
    layout: str,
    compiled: bool,
    device: torch.device,
    seconds: float,
    *,
    dtype: str = "fp32",
    classes: int = CLASSES,
    graph: bool = False,
) -> Plan:
    """graph: on a GPU, replayed graphs instead of calls."""
    name = f"{model}, {direction}, {pixels}px {dtype} {layout} B={batch}" + f" width {width:g}" * (width != 1) + " compiled" * compiled + " graph" * graph
    build = partial(network, name, model, direction, pixels, batch, width, layout, compiled, dtype, classes, graph, device)
    return Plan(name, (*NETWORKS, *([NO_BRANCHES] if device.type == "cuda" else [])), build, seconds)


def network(
    name: str,
    model: str,
    direction: str,
    pixels: int,
    batch: int,
    width: float,
    layout: str,
    compiled: bool,
    dtype: str,
    classes: int,
    graph: bool,
    device: torch.device,
) -> Case:
    torch.manual_seed(0)
    torch.compiler.reset()
    training = direction == "training step"
    torch.backends.cudnn.benchmark = device.type == "cuda"
    networks = NETWORKS | ({NO_BRANCHES: ("base", {"head": "last", "stage": "fused"})} if device.type == "cuda" else {})
    nets = {key: interflow_vision.create_model(model, num_classes=classes, width=width, **options) for key, (_, options) in networks.items()}
    ours = nets["Interflow fused"]
    for key, net in nets.items():
        (net if key == "Interflow naive" else net.features).load_state_dict((ours if key == "Interflow naive" else ours.features).state_dict())
        net.to(device=device, dtype=DTYPES[dtype], memory_format=FORMATS[layout]).train(training)
    ways: dict[str, nn.Module] = {key: peers.compiled(net) if compiled else net for key, net in nets.items()}
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, pixels, pixels, generator=generator).to(device, DTYPES[dtype], memory_format=FORMATS[layout])
    target = (torch.arange(batch) % classes).to(device)
    optimizers = {key: torch.optim.SGD(net.parameters(), lr=1e-4) for key, net in nets.items()}

    def infer(key: str, _: int) -> Tensor:
        with torch.inference_mode():
            return ways[key](x)

    def step(key: str, _: int) -> None:
        optimizers[key].zero_grad()
        F.cross_entropy(ways[key](x), target).backward()
        optimizers[key].step()

    def loss(key: str) -> Tensor:
        return F.cross_entropy(ways[key](x), target)

    def gradients(key: str, way: nn.Module) -> list[Tensor]:
        """Logits, and the gradients of the first and the last convolution."""
        y = way(x)
        convolutions = [layer.weight for layer in nets[key].features.modules() if isinstance(layer, nn.Conv2d)]
        return [y, *torch.autograd.grad(F.cross_entropy(y, target), [convolutions[0], convolutions[-1]])]

    def provider(key: str, kind: Kind) -> Provider:
        if not training:
            return Provider(partial(infer, key), kind)
        saved = partial(saved_bytes, partial(loss, key), [x, *nets[key].parameters(), *nets[key].buffers()])
        return Provider(partial(step, key), kind, result=lambda: gradients(key, ways[key]), saved=saved)

    def expected() -> list[Tensor]:
        naive = nets["Interflow naive"]
        if training:
            return gradients("Interflow naive", naive)
        with torch.inference_mode():
            return [naive(x)]

    chosen = [goals.faster_than("plain", 1.0, low=0.98)] if pixels == 32 and batch == 64 and width == 1 and not compiled and device.type == "cpu" else []
    if device.type == "cuda" and dtype == "bf16":
        chosen = goals.gpu_network(model, direction, pixels, compiled or graph)
    return Case(
        "network",
        name,
        "device" if graph else "wall",
        {key: provider(key, kind) for key, (kind, _) in networks.items()},
        {"pass": direction, "dtype": dtype, "layout": layout, "batch": batch, "pixels": pixels, "classes": classes, "model": model, "compiled": compiled},
        images=batch,
        expected=expected,
        tolerance=TOLERANCE[dtype],
        goals={"Interflow fused": chosen},
        memory=training,
    )
