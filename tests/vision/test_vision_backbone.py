"""The trainer with a backbone of timm: fit, a checkpoint, predict, what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision_operators
from conftest import TINY_DATA, environment
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from interflow_vision import InterflowNetwork
from interflow_vision.cli import predict
from interflow_vision.data.modules import Digits
from interflow_vision.errors import UserError
from interflow_vision.training import checkpoints
from interflow_vision.training.classifier import Classifier

torchvision_operators.make_importable()
pytest.importorskip("timm", reason="timm and torchvision (extra [backbones]) are not installed")

OPTIONS = {"backbone": "test_resnet", "lr": 0.02}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("backbone")
    seed_everything(0, verbose=False)
    callback = ModelCheckpoint(dirpath=folder, filename="small")
    trainer = Trainer(
        max_epochs=1, logger=False, callbacks=[callback], accelerator="cpu", limit_train_batches=3, limit_val_batches=2,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(**OPTIONS), datamodule=Digits(**TINY_DATA))
    return Path(callback.best_model_path), dict(trainer.callback_metrics)


def test_a_backbone_is_trained_and_its_branches_are_reported(trained):
    metrics = trained[1]
    assert {"val/accuracy", "val/accuracy_branch1", "val/accuracy_branch4", "contribution/branch1", "contribution/branch4"} <= set(metrics)
    assert torch.isfinite(torch.as_tensor(metrics["val/loss"]))


def test_its_checkpoint_is_loaded_and_predicts(trained, digit_files, capsys):
    classifier = checkpoints.load(trained[0])
    assert isinstance(classifier.model, InterflowNetwork) and classifier.model.replaced
    ready = classifier.model.for_inference()
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(ready(x), classifier(x), rtol=1e-3, atol=1e-3)
    assert predict.main(["--ckpt", str(trained[0]), *map(str, digit_files[:3])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == [str(f) for f in digit_files[:3]]


COMMAND = "import torchvision_operators as o, sys; o.make_importable(); from interflow_vision.cli import main; sys.exit(main())"


@pytest.mark.slow
def test_the_command(lightning_cli, tmp_path):
    options = ["--model.backbone", "test_resnet", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"]
    options += ["--trainer.limit_test_batches", "1", "--trainer.accelerator", "cpu", "--data.batch_size", "8"]
    command = [sys.executable, "-c", COMMAND, "fit", *options]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "Test accuracy of" in result.stdout and (tmp_path / "runs/digits/version_0/curves.png").is_file()


def test_a_size_that_the_backbone_does_not_take():
    data, classifier = (
        Digits(size=16),
        Classifier(backbone="vit_tiny_patch16_224", backbone_options={"img_size": 32, "embed_dim": 32, "depth": 4, "num_heads": 2}),
    )
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)
    with pytest.raises(UserError, match=r"images of 16 pixels a side do not fit this backbone, which takes 32: give --data.size 32, or a backbone built"):
        trainer.fit(classifier, datamodule=data)


def test_refusals():
    with pytest.raises(ValueError, match="backbone: timm has no model 'resnet81'"):
        Classifier(backbone="resnet81")
    with pytest.raises(ValueError, match="backbone_options must not have 'pretrained': give --model.pretrained true"):
        Classifier(backbone="resnet18", backbone_options={"pretrained": True})
    with pytest.raises(ValueError, match="in_channels must be 3 for torchvision/resnet18, got 1"):
        Classifier(backbone="torchvision/resnet18", in_channels=1)
    assert Classifier(backbone="test_resnet", in_channels=1).model.in_channels == 1
