"""Interflow on backbones of timm: plain, with the naive head, with the fused head, and with fused stage ends too; training step and inference.

The quick set has one case; `make bench-backbones` measures all of them. Without timm there is nothing to measure.
"""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals
from harness.case import Case, Plan, Provider
from harness.inputs import DTYPES, FORMATS
from harness.memory import saved_bytes
from harness.run import Session
from torch import Tensor, nn

import interflow_vision

BACKBONES = {"resnet50": 160, "convnext_tiny": 160, "swin_tiny_patch4_window7_224": 224, "efficientnet_b0": 160, "vit_small_patch16_224": 224}
"""Name -> pixels a side on a CPU; a GPU takes 224 for all."""

WAYS: dict[str, dict[str, str] | None] = {
    "fused head and stage ends": {"head": "fused", "stage_end": "fused"},
    "fused head": {"head": "fused", "stage_end": "eager"},
    "naive head": {"head": "eager", "stage_end": "eager"},
    "plain": None,
}
KINDS = {"fused head and stage ends": "ours", "fused head": "base", "naive head": "peer", "plain": "base"}
TOLERANCE = {"fp32": 5e-3, "bf16": 0.1}
CLASSES = 1000
ROOT = Path(__file__).resolve().parent.parent


class Network:
    """One way on one backbone, with its images x [B, 3, H, W] and targets [B]."""

    def __init__(self, net: nn.Module, x: Tensor, target: Tensor, training: bool) -> None:
        self.net, self.x, self.target, self.training = net.train(training), x, target, training
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)

    def call(self, _: int = 0) -> Tensor | None:
        """A training step, or the logits under inference_mode."""
        if not self.training:
            with torch.inference_mode():
                return self.net(self.x)
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return None

    def loss(self) -> Tensor:
        return F.cross_entropy(self.net(self.x), self.target)

    def results(self) -> list[Tensor]:
        """In eval mode, since batches are small: logits, and for a training step the gradient of the first weight too."""
        self.net.eval()
        try:
            with torch.set_grad_enabled(self.training):
                y = self.net(self.x)
                if not self.training:
                    return [y]
                first = next(p for p in self.net.parameters() if p.dim() > 1)
                return [y.detach(), *torch.autograd.grad(F.cross_entropy(y, self.target), [first])]
        finally:
            self.net.train(self.training)

    def saved(self) -> int:
        """Bytes kept for backward."""
        return saved_bytes(self.loss, [self.x, *self.net.parameters(), *self.net.buffers()])


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    if importlib.util.find_spec("timm") is None and not (ROOT / ".venv" / "backbones" / "timm").is_dir():
        return
    cpu = device.type == "cpu"
    for name, pixels in BACKBONES.items():
        for layout in ("nchw",) if cpu and not full else ("nchw", "channels_last"):
            for direction in ("training step", "inference"):
                if full or (name, direction) == ("resnet50", "training step"):
                    yield plan(name, direction, pixels if cpu else 224, 8 if cpu else 32, layout, "fp32" if cpu else "bf16", device)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


def plan(name: str, direction: str, pixels: int, batch: int, layout: str, dtype: str, device: torch.device) -> Plan:
    title = f"{name}, {direction}, {pixels}px {dtype} {layout} B={batch}"
    return Plan(title, tuple(WAYS), partial(case_of, title, name, direction, pixels, batch, layout, dtype, device), 40.0 if device.type == "cpu" else 4.0, 15.0)


def case_of(title: str, name: str, direction: str, pixels: int, batch: int, layout: str, dtype: str, device: torch.device) -> Case:
    made = build(name, direction == "training step", pixels, batch, layout, dtype, device)
    providers = {}
    for way, network in made.items():
        extra = {"result": network.results, "saved": network.saved} if network.training else {}
        providers[way] = Provider(network.call, KINDS[way], **extra)  # type: ignore[arg-type]
    chosen = [goals.faster_than("plain", 1.0, low=0.98)] if device.type == "cpu" else []
    about = {"dtype": dtype, "layout": layout, "batch": batch, "pixels": pixels, "classes": CLASSES, "model": name, "compiled": False}
    return Case(
        "network",
        title,
        "wall",
        providers,
        {"pass": direction, **about},
        images=batch,
        expected=made["naive head"].results,
        tolerance=TOLERANCE[dtype],
        by_norm=True,
        goals={"fused head and stage ends": chosen},
        memory=True,
    )


def build(name: str, training: bool, pixels: int, batch: int, layout: str, dtype: str, device: torch.device) -> dict[str, Network]:
    """All ways with the same weights, on the same images."""
    timm = _timm()
    torch.manual_seed(0)
    x = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    x = x.to(device, DTYPES[dtype], memory_format=FORMATS[layout])
    target = (torch.arange(batch) % CLASSES).to(device)
    nets: dict[str, nn.Module] = {}
    for way, options in WAYS.items():
        if options is None:
            nets[way] = timm.create_model(name, num_classes=CLASSES)
        else:
            nets[way] = interflow_vision.attach(name, CLASSES, **options)  # type: ignore[arg-type]
            nets[way].load_state_dict(nets["fused head and stage ends"].state_dict())
    moved = {way: net.to(device=device, dtype=DTYPES[dtype], memory_format=FORMATS[layout]) for way, net in nets.items()}  # type: ignore[call-overload]
    return {way: Network(net, x, target, training) for way, net in moved.items()}


@cache
def _timm() -> Any:
    """timm, made importable as for the tests."""
    sys.path.append(str(ROOT / "tests"))
    importlib.import_module("torchvision_operators").make_importable()
    return importlib.import_module("timm")
