"""`python -m interflow_vision.demo`: trains VGG-16 with the fused Interflow head on real digits and times the head, in two minutes."""

import argparse
import copy
import logging
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from interflow_kernels import FusedInterflowHead, _backend

from . import digits, report, runs
from .errors import UserError
from .lit import Classifier
from .quiet import quiet
from .timing import Timing, interleaved

STAGES = ((128, 112), (256, 56), (512, 28), (512, 14))
"""Channels and side of the four stage features of VGG-16 at 224x224."""

CLASSES, BATCH = 1000, 8


class EpochLines(Callback):
    """A line for each epoch."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what the epoch came to."""
        seen = trainer.callback_metrics
        print(
            f"  epoch {trainer.current_epoch + 1:2}/{trainer.max_epochs}   training loss {seen['train/loss']:.3f}   "
            f"validation accuracy {seen['val/accuracy']:6.1%}   {seen['train/images_per_second']:5.0f} images/s",
            flush=True,
        )


def train(root: Path, seed: int, lines: bool) -> tuple[Trainer, Classifier, dict[str, float]]:
    """A run of digits.yaml; the trainer, the model with the weights of the best checkpoint, and what the test logged."""
    silent = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer, model, data = digits.prepare(root, seed, callbacks=[EpochLines()] if lines else [], **silent)
    trainer.fit(model, datamodule=data)
    best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    return trainer, model, dict(trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)[0])


def time_heads(device: str) -> dict[str, dict[str, Timing]]:
    """The head alone at VGG-16's stage shapes, forward and forward + backward, after checking that both give the same."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(BATCH, c, side, side, generator=generator).to(device).requires_grad_() for c, side in STAGES]
    dy = torch.randn(BATCH, CLASSES, generator=generator).to(device)
    fused = FusedInterflowHead([c for c, _ in STAGES], CLASSES).to(device)
    heads = {"plain": fused.to_eager(), "fused": fused}  # the same parameters
    inputs = [*features, *fused.parameters()]

    def both_ways(name: str) -> list[Tensor]:
        y = heads[name](features)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    def forward(name: str) -> Tensor:
        with torch.no_grad():
            return heads[name](features)

    for plain, other in zip(both_ways("plain"), both_ways("fused"), strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-3, atol=1e-4)
    return {
        "head, forward": interleaved({name: partial(forward, name) for name in heads}, 20),
        "head, forward + backward": interleaved({name: partial(both_ways, name) for name in heads}, 20),
    }


def time_train_step(model: Classifier, device: str) -> dict[str, Timing]:
    """A whole training step of the network just trained, with the plain head and with the fused one."""
    net = model.model.to(device).train()
    plain = copy.deepcopy(net)
    assert isinstance(plain.head, FusedInterflowHead)
    plain.head = plain.head.to_eager()
    x, target = torch.randn(64, 3, 32, 32, device=device), torch.arange(64, device=device) % 10
    nets = {"plain": plain, "fused": net}
    optimizers = {name: torch.optim.SGD(n.parameters(), lr=1e-3) for name, n in nets.items()}

    def step(name: str) -> None:
        optimizers[name].zero_grad()
        F.cross_entropy(nets[name](x), target).backward()
        optimizers[name].step()

    return interleaved({name: partial(step, name) for name in nets}, 20)


def demo(root: Path) -> None:
    """Trains, tests, times, and says where everything lies."""
    start = time.perf_counter()
    print("VGG-16 with batch norm, a quarter of its width, 4 stages, fused Interflow head (attention nxn).")
    print("scikit-learn's digits as 32x32 images: 1,077 for training, 360 for validation, 360 for test.\n", flush=True)
    trainer, model, metrics = train(root, seed=0, lines=True)
    folder = runs.folder(trainer)
    rates = report.read_log(folder)["train/images_per_second"].values()
    print("\nAccuracy on the 360 test images, which neither training nor the choice of the checkpoint saw:")
    print(report.accuracy_table(metrics))
    print("  (the branches are trained together, as terms of one sum: one alone need not be good)")
    print(f"Training ran at {median(rates):.0f} images/s, all in all {time.perf_counter() - start:.0f} s.\n", flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = time_heads(device) | {"whole training step": time_train_step(model, device)}
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Fused head against plain PyTorch head, same results, same run ({where}, float32; median and quartiles of 20):")
    print(f"  {'':26}{'plain':>28}{'fused':>28}{'plain / fused':>16}")
    for name, timing in rows.items():
        print(f"  {name:26}{timing['plain']!s:>28}{timing['fused']!s:>28}{timing['plain'].median / timing['fused'].median:15.2f}x")
    shapes = ", ".join(f"{c}x{side}x{side}" for c, side in STAGES)
    print(f"Head: {BATCH} images, stages {shapes}, {CLASSES} classes. Training step: the network above, 64 images.")
    if _backend.select(device) == "eager":
        print(f"Both columns are plain PyTorch here: {_backend.reason_against('native', device)}")

    print(f"\nCheckpoint  {folder / 'checkpoints' / 'best.ckpt'}")
    print(f"Logs        {folder / 'metrics.csv'}; TensorBoard: tensorboard --logdir {root}")
    print(f"Picture     {report.draw(folder)}")


def seeds(count: int) -> None:
    """The same recipe with seeds 0, 1, ...: test accuracy of each, mean and range."""
    found = []
    for seed in range(count):
        with tempfile.TemporaryDirectory() as folder:
            metrics = train(Path(folder), seed, lines=False)[2]
        found.append(metrics["test/accuracy"])
        print(f"  seed {seed}   test accuracy {found[-1]:.2%}", flush=True)
    print(f"  mean {mean(found):.2%}, lowest {min(found):.2%}, highest {max(found):.2%}")


def main() -> int:
    """The command; returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m interflow_vision.demo", description="Trains on real digits, tests, and times the head.")
    parser.add_argument("--root", type=Path, default=Path("runs/demo"), help="where the run's folder goes (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="only train and test, with the seeds 0 to N-1, and report mean and range")
    given = parser.parse_args()
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        if given.seeds > 0:
            seeds(given.seeds)
        else:
            runs.require_writable(given.root)
            demo(given.root)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
