"""Every file in configs/ is parsed by the command, trains two steps on small files in the true format, and says what to expect and why."""

import re
import sys
from pathlib import Path

import formats
import pytest
import torch
import yaml

from interflow_vision.cli import command as cli
from interflow_vision.data import known
from interflow_vision.reports import curves

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread", "lightning_cli")]


def write(name: str, root: Path) -> tuple[str, ...]:
    """Small files for a recipe, and the options with which it finds them."""
    data = yaml.safe_load(next(path for path in CONFIGS if path.stem == name).read_text())["data"]["class_path"].rpartition(".")[2]
    if data == "ImageFolder":
        formats.write_folder(root)
        return ("--data.size", "32", "--data.num_workers", "0", "--model.num_classes", "2")
    if data == "FashionMNIST":
        formats.write_mnist(root)
    else:
        formats.write_cifar(root, getattr(known, data).classes, train=400 if data == "CIFAR100" else 40)
    return ("--data.validation", "100" if data == "CIFAR100" else "10")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_trains_two_steps(path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    where = write(path.stem, tmp_path / "files")
    small = ("--model.width", "0.03125", "--model.pretrained", "false", "--data.root", "files", "--data.batch_size", "4", "--trainer.max_epochs", "1")
    quick = ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2",
        "--trainer.limit_test_batches", "2", "--trainer.enable_model_summary", "false")  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["interflow", "fit", "--config", str(path), *small, *where, *quick])
    assert cli.main() == 0, capfd.readouterr().err
    given = yaml.safe_load(path.read_text())
    run = Path(given["trainer"]["default_root_dir"]) / "version_0"
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    config = yaml.safe_load((run / "config.yaml").read_text())
    for name in ("optimizer", "schedule", "warmup", "lr", "weight_decay", "attention"):
        assert config["model"][name] == given["model"].get(name, config["model"][name]) == kept["hyper_parameters"][name]
    assert ("current_model_state" in kept) == (path.stem == "finetune")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_says_what_to_expect_and_why(path):
    text = path.read_text()
    assert re.search(r"^# .*interflow fit --config configs/" + path.name, text, re.MULTILINE)
    assert "# To expect: " in text and max(map(len, text.splitlines())) <= 150
    assert "Source" in text or path.stem == "fashion_mnist_small"


def test_there_are_recipes():
    assert {path.stem for path in CONFIGS} >= {"cifar10", "cifar100", "fashion_mnist", "fashion_mnist_small", "imagenet", "finetune"}


@pytest.mark.slow
def test_the_small_recipe_learns_from_a_part_of_fashion_mnist(tmp_path, monkeypatch, capfd):
    """Two epochs of 60 batches, an eighth of the images; the whole recipe is for `docs/training.md`."""
    if not Path("/usr/share/datasets/fashion-mnist").is_dir():
        pytest.skip("Debian's package dataset-fashion-mnist is not installed")
    monkeypatch.chdir(tmp_path)
    path = next(path for path in CONFIGS if path.stem == "fashion_mnist_small")
    quick = ("--trainer.limit_train_batches", "60", "--trainer.max_epochs", "2", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false")
    monkeypatch.setattr(sys, "argv", ["interflow", "fit", "--config", str(path), *quick])
    assert cli.main() == 0, capfd.readouterr().err
    log = curves.read_log(Path("runs/fashion_mnist_small/version_0"))
    assert log["test/accuracy"][1] > 0.6, log["test/accuracy"]
