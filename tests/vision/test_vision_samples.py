"""The small checkpoint and the images that come with the package: how they are made, and that they are tried in one command."""

import sys

import formats
import pytest
import torch
from PIL import Image

from interflow_vision.cli import command as cli
from interflow_vision.cli import samples as making
from interflow_vision.data.known import FashionMNIST
from interflow_vision.errors import UserError
from interflow_vision.training import checkpoints, samples
from interflow_vision.training.classifier import Classifier


def test_a_checkpoint_is_shrunk_to_what_a_prediction_needs(checkpoint, tmp_path, monkeypatch):
    making.shrink(checkpoint, tmp_path / "small.ckpt")
    before, after = checkpoints.load(checkpoint), checkpoints.load(tmp_path / "small.ckpt")
    assert "optimizer_states" not in torch.load(tmp_path / "small.ckpt", weights_only=True)
    assert (tmp_path / "small.ckpt").stat().st_size < checkpoint.stat().st_size
    assert after.preprocessing == before.preprocessing and after.class_names == before.class_names
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(before(x), after(x))
    monkeypatch.setattr(samples, "LIMIT", 1000)
    with pytest.raises(UserError, match="more than the 1000 that are shipped: train with a smaller --model.width"):
        making.shrink(checkpoint, tmp_path / "big.ckpt")
    assert not (tmp_path / "big.ckpt").exists()


def test_the_recipes_network_is_small_enough(tmp_path):
    """Weights alone; the rest of a checkpoint takes a few kilobytes."""
    torch.save(Classifier(width=0.25, in_channels=1).state_dict(), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < samples.LIMIT - 100_000


def test_the_images_are_the_first_of_each_class(tmp_path):
    formats.write_mnist(tmp_path / "files")
    data = FashionMNIST(str(tmp_path / "files"))
    written = making.write_images(data, tmp_path / "images")
    images, target = data.read()[1]
    for number, path in enumerate(written):
        with Image.open(path) as image:
            first = images[(target == number).nonzero()[0, 0], 0]
            assert image.mode == "L" and torch.equal(torch.tensor(list(image.tobytes()), dtype=torch.uint8).view(28, 28), first)
    assert written[0].name == "T-shirt.png" and written[-1].name == "ankle_boot.png"


def test_ten_images_are_there():
    assert len(list(samples.IMAGES.glob("*.png"))) == 10
    assert sum(path.stat().st_size for path in samples.IMAGES.iterdir()) < 20_000


def test_they_are_tried_in_one_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["interflow", "predict", "--ckpt", "sample"])
    monkeypatch.setattr(samples, "CHECKPOINT", tmp_path / "none.ckpt")
    assert cli.main() == 2 and "this installation has no sample checkpoint" in capsys.readouterr().err
    making.shrink(checkpoint, tmp_path / "none.ckpt")
    assert cli.main() == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 10 and all("samples" in line for line in out)


def test_the_shipped_checkpoint_knows_its_images():
    if not samples.CHECKPOINT.is_file():
        pytest.skip("no sample checkpoint is shipped yet")
    assert samples.CHECKPOINT.stat().st_size <= samples.LIMIT
    classifier = checkpoints.load(samples.CHECKPOINT)
    files = sorted(samples.IMAGES.glob("*.png"))
    with torch.no_grad():
        answers = classifier(torch.stack([classifier.preprocessing.read(file) for file in files])).argmax(1)
    expected = [classifier.class_names[i].partition("/")[0].replace(" ", "_") for i in answers]
    assert sum(name == file.stem for name, file in zip(expected, files, strict=True)) >= 8
