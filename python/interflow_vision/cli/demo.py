"""`python -m interflow_vision.cli.demo`: trains VGG-16 with Interflow, fused, on real digits and times what is fused, in two minutes."""

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median

import torch
from lightning.pytorch import Trainer

from interflow_kernels import _backend

from ..errors import UserError
from ..models.vgg import VGG
from ..reports import comparison, curves
from ..training import runs
from ..training.classifier import Classifier
from ..training.progress import EpochLines
from ..training.quiet import quiet
from . import digits


def train(root: Path, seed: int, lines: bool) -> tuple[Trainer, Classifier, dict[str, float]]:
    """A run of digits.yaml; the trainer, the model with the weights of the best checkpoint, and what the test logged."""
    silent = {"enable_progress_bar": lines, "enable_model_summary": False}
    trainer, model, data = digits.prepare(root, seed, callbacks=[EpochLines()] if lines else [], **silent)
    trainer.fit(model, datamodule=data)
    best = str(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    return trainer, model, dict(trainer.test(model, datamodule=data, ckpt_path=best, verbose=False)[0])


def demo(root: Path) -> None:
    """Trains, tests, times, and says where everything lies."""
    start = time.perf_counter()
    print("VGG-16 with batch norm, a quarter of its width, 4 stages that end in a StageTap, fused Interflow head (attention nxn).")
    print("scikit-learn's digits as 32x32 images: 1,077 for training, 360 for validation, 360 for test.\n", flush=True)
    trainer, model, metrics = train(root, seed=0, lines=True)
    folder = runs.folder(trainer)
    rates = curves.read_log(folder)["train/images_per_second"].values()
    print("\nAccuracy on the 360 test images, which neither training nor the choice of the checkpoint saw:")
    print(curves.accuracy_table(metrics))
    print("  (the branches are trained together, as terms of one sum: one alone need not be good)")
    print(f"Training ran at {median(rates):.0f} images/s, all in all {time.perf_counter() - start:.0f} s.\n", flush=True)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"Fused against plain PyTorch, same results, same run ({where}, float32; median and quartiles of {comparison.ROUNDS}):")
    rows = comparison.time_parts(device)
    print(f"  {'':36}{'plain':>28}{'fused':>28}{'plain / fused':>16}")
    for name, timing in rows.items():
        print(f"  {name:36}{timing['plain']!s:>28}{timing['fused']!s:>28}{timing['plain'].median / timing['fused'].median:15.2f}x")
    print(f"  ({comparison.SHAPES})\n")
    print("A whole training step of the network above, 64 images:")
    assert isinstance(model.model, VGG)  # digits.yaml's
    steps = comparison.time_train_steps(model.model, device)
    base = steps["VGG-16 without Interflow"].median
    for name, step in steps.items():
        print(f"  {name:36}{step!s:>28}{base / step.median:15.2f}x")
    if _backend.select(device) == "eager":
        print(f"All of this is plain PyTorch here: {_backend.reason_against('native', device)}")

    print(f"\nCheckpoint  {folder / 'checkpoints' / 'best.ckpt'}")
    print(f"Logs        {folder / 'metrics.csv'}; TensorBoard: tensorboard --logdir {root}")
    print(f"Picture     {curves.draw(folder)}")


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
    parser = argparse.ArgumentParser("python -m interflow_vision.cli.demo", description="Trains on real digits, tests, and times the head.")
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
