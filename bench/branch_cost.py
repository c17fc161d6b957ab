"""What a norm and a loss on the branches cost: `PYTHONPATH=bench python bench/branch_cost.py`, two minutes on a quiet machine.

Training steps of VGG-16, 64 images of 32 pixels, timed in turns; ratio to the same network without either, median of paired rounds with its 95 %
interval. Then the head alone on the maps of VGG-16 at 224 pixels, 8 images: forward and backward, and forward in evaluation mode.
"""

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from harness.stats import quantile, ratio_interval

import interflow_vision
from interflow_kernels import FusedInterflowHead

ARMS = {"without": {}, "norm": {"norm": "batch"}, "norm and branch loss": {"norm": "batch", "branch_loss": 0.3}}
MAPS = ((128, 112), (256, 56), (512, 28), (512, 14))


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round, in turns; three rounds first that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 3):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def steps(model: str, width: float, device: str) -> dict[str, Callable[[], object]]:
    x, target = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10

    def step_of(options: dict[str, object]) -> Callable[[], object]:
        torch.manual_seed(0)
        net = interflow_vision.create_model(model, width=width, **options).to(device).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

        def step() -> None:
            optimizer.zero_grad()
            loss = net.head.loss(net.forward_branches(x), target) if "branch_loss" in options else F.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()

        return step

    return {name: step_of(options) for name, options in ARMS.items()}


def heads(training: bool, device: str) -> dict[str, Callable[[], object]]:
    maps = [torch.randn(8, c, side, side, device=device).requires_grad_(training) for c, side in MAPS]

    def call_of(norm: str | None) -> Callable[[], object]:
        head = FusedInterflowHead([c for c, _ in MAPS], 1000, norm=norm, device=device).train(training)
        leaves, dy = [*maps, *head.parameters()], torch.randn(8, 1000, device=device)
        if training:
            return lambda: torch.autograd.grad(head(maps), leaves, dy)
        return torch.no_grad()(lambda: head(maps))

    return {"without": call_of(None), "norm": call_of("batch")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    cases = {
        "vgg16, training step": lambda: steps("vgg16", 1.0, given.device),
        "vgg16_bn width 0.25, training step": lambda: steps("vgg16_bn", 0.25, given.device),
        "head on maps, forward + backward": lambda: heads(True, given.device),
        "head on maps, evaluation": lambda: heads(False, given.device),
    }
    for title, make in cases.items():
        seconds = timed(make(), given.rounds)
        base = seconds["without"]
        print(f"{title}: {1e3 * quantile(base, 0.5):.2f} ms without", flush=True)
        for name, taken in seconds.items():
            if name != "without":
                ratio, low, high = ratio_interval(taken, base)
                print(f"  {name:24}{ratio:.4f} [{low:.4f}, {high:.4f}] of that", flush=True)


if __name__ == "__main__":
    main()
