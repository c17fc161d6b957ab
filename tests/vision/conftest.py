"""Fixtures of the vision tests: a small trained checkpoint, digits as image files, and the command in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_utilities.core.imports import RequirementCache
from PIL import Image
from sklearn.datasets import load_digits
from torchvision_operators import FOLDER

from interflow_vision.data.modules import Digits
from interflow_vision.training.classifier import Classifier

TINY_MODEL = {"width": 0.0625, "lr": 0.02}
TINY_DATA = {"size": 16, "batch_size": 64}


@pytest.fixture(scope="session")
def lightning_cli() -> None:
    """For tests that start LightningCLI, which needs two packages of its own."""
    if not RequirementCache("jsonargparse[signatures]>=4.27.7"):
        pytest.skip("jsonargparse[signatures] is not installed in full: docstring-parser and typeshed-client are missing")


@pytest.fixture(scope="session")
def interflow() -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """interflow(*arguments, cwd=folder): runs the command in a process of its own."""

    def run(*arguments: object, cwd: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "interflow_vision", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)

    return run


def environment() -> dict[str, str]:
    """The process's, with import paths that hold in any working directory and two threads; not that of backbones, see there."""
    entries = [Path(entry).resolve() for entry in sys.path if entry and Path(entry).exists()]
    path = os.pathsep.join(str(entry) for entry in entries if entry != FOLDER)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small network after a few steps: it knows little, but has everything that a checkpoint has."""
    folder = tmp_path_factory.mktemp("checkpoint")
    seed_everything(0, verbose=False)
    callback = ModelCheckpoint(dirpath=folder, filename="small")
    trainer = Trainer(
        max_epochs=1, logger=False, callbacks=[callback], accelerator="cpu", limit_train_batches=2, limit_val_batches=1,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(**TINY_MODEL), datamodule=Digits(**TINY_DATA))
    return Path(callback.best_model_path)


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first ten digits as 8x8 greyscale PNG files."""
    folder = tmp_path_factory.mktemp("digits")
    files = []
    for i, image in enumerate(load_digits().images[:10]):
        pixels = torch.from_numpy(image * 255 / 16).round().to(torch.uint8).numpy()
        files.append(folder / f"digit {i}.png")
        Image.fromarray(pixels).save(files[-1])
    return files
