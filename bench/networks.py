"""VGG-16 with Interflow, fused and in plain PyTorch, and without it: what the benchmark of whole networks times and the profile takes apart."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from harness import peers
from harness.case import Kind
from harness.inputs import DTYPES, FORMATS
from harness.memory import saved_bytes
from torch import Tensor, nn

import interflow_vision

DIRECTIONS = ("training step", "inference")
NO_BRANCHES = "fused, no branches"
NETWORKS: dict[str, tuple[Kind, dict[str, str]]] = {
    "Interflow fused": ("ours", {"head": "fused", "stage": "fused"}),
    "Interflow naive": ("peer", {"head": "eager", "stage": "eager"}),
    "plain": ("base", {"head": "last", "stage": "eager"}),
    # the plain network whose max-pools are taps: beside it, what the branches and the head cost on top
    NO_BRANCHES: ("base", {"head": "last", "stage": "fused"}),
}


@dataclass(frozen=True)
class Cell:
    """One shape and one way to run a network. dtype: of weights and images, "fp32" or "bf16"; or "autocast", fp32 weights under bf16 autocast.

    graph: on a GPU, replayed graphs instead of calls.
    """

    model: str
    direction: str
    pixels: int
    batch: int
    width: float = 1.0
    layout: str = "nchw"
    dtype: str = "fp32"
    compiled: bool = False
    graph: bool = False
    classes: int = 10

    @property
    def name(self) -> str:
        shape = f"{self.pixels}px {self.dtype} {self.layout} B={self.batch}" + f" width {self.width:g}" * (self.width != 1)
        return f"{self.model}, {self.direction}, {shape}" + " compiled" * self.compiled + " graph" * self.graph

    @property
    def training(self) -> bool:
        return self.direction == "training step"


class Network:
    """One network of a cell with its images x [B, 3, H, W] and targets [B]."""

    def __init__(self, cell: Cell, net: nn.Module, x: Tensor, target: Tensor) -> None:
        self.cell, self.net, self.x, self.target = cell, net, x, target
        self.way = peers.compiled(net) if cell.compiled else net
        self.optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def call(self, _: int = 0) -> Tensor | None:
        """A training step, or the logits under inference_mode."""
        if not self.cell.training:
            with torch.inference_mode(), self._autocast():
                return self.way(self.x)
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        return None

    def loss(self) -> Tensor:
        with self._autocast():
            return F.cross_entropy(self.way(self.x), self.target)

    def results(self, eager: bool = False) -> list[Tensor]:
        """Logits, and for a training step the gradients of the first and the last convolution. eager: not compiled."""
        way = self.net if eager else self.way
        with torch.inference_mode(not self.cell.training), self._autocast():
            y = way(self.x)
            if not self.cell.training:
                return [y]
            loss = F.cross_entropy(y, self.target)
        convolutions = [layer.weight for layer in self.net.features.modules() if isinstance(layer, nn.Conv2d)]
        return [y, *torch.autograd.grad(loss, [convolutions[0], convolutions[-1]])]

    def saved(self) -> int:
        """Bytes kept for backward."""
        return saved_bytes(self.loss, [self.x, *self.net.parameters(), *self.net.buffers()])

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.cell.dtype == "autocast")


def build(cell: Cell, names: Iterable[str], device: torch.device) -> dict[str, Network]:
    """The networks of these names, on the same images and with the same convolutions; "Interflow naive" has the weights of "Interflow fused" throughout."""
    torch.manual_seed(0)
    torch.compiler.reset()
    torch.backends.cudnn.benchmark = device.type == "cuda"
    dtype, layout = DTYPES.get(cell.dtype, torch.float32), FORMATS[cell.layout]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(cell.batch, 3, cell.pixels, cell.pixels, generator=generator).to(device, dtype, memory_format=layout)
    target = (torch.arange(cell.batch) % cell.classes).to(device)
    made: dict[str, Network] = {}
    with device:
        nets = {name: interflow_vision.create_model(cell.model, num_classes=cell.classes, width=cell.width, **NETWORKS[name][1]) for name in names}
    first = next(iter(nets.values()))
    for name, net in nets.items():
        net.features.load_state_dict(first.features.state_dict())
        if name == "Interflow naive" and "Interflow fused" in nets:
            net.load_state_dict(nets["Interflow fused"].state_dict())
        made[name] = Network(cell, net.to(device=device, dtype=dtype, memory_format=layout).train(cell.training), x, target)
    return made
