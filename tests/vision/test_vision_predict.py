"""`interflow predict` in this process: what counts as a file, what one bad file costs the others, and checkpoints that lack something."""

import csv
import io
import json
import os
import shutil
import sys
import threading

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from interflow_vision.cli import command as cli
from interflow_vision.data.images import Preprocessing
from interflow_vision.training import checkpoints
from interflow_vision.training.classifier import CHECKPOINT_KEY, Classifier

TINY = {"width": 0.0625, "lr": 0.02}


@pytest.fixture
def command(monkeypatch, capsys, checkpoint):
    """command(*files): exit code, lines of stdout as [file, class, probability], lines of stderr."""

    def run(*arguments, ckpt=checkpoint):
        monkeypatch.setattr(sys, "argv", ["interflow", "predict", "--ckpt", str(ckpt), *map(str, arguments)])
        capsys.readouterr()  # what a training before it has printed
        code = cli.main()
        out, err = capsys.readouterr()
        return code, [line.split("\t") for line in out.splitlines()], err.splitlines()

    return run


@pytest.fixture
def mixed(tmp_path, digit_files):
    """A folder with four good images and three files that are none."""
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "c.png", "e.png", "below/f.png")):
        shutil.copy(digit_files[number], folder / name)
    (folder / "b.png").write_text("no image")
    (folder / "d.png").write_bytes(digit_files[0].read_bytes()[:60])
    (folder / "notes.txt").write_text("not meant")
    return folder


def test_good_images_are_classified_beside_bad_ones(command, mixed, checkpoint):
    files = [mixed / name for name in ("a.png", "b.png", "c.png", "d.png", "none.png", "e.png")]
    code, rows, errors = command(*files)
    assert code == 1
    assert [row[0] for row in rows] == [str(files[i]) for i in (0, 2, 5)]
    assert errors[0] == f"interflow: {files[1]} is not an image that Pillow can read"
    assert errors[1].startswith(f"interflow: the image {files[3]} cannot be read: ")
    assert errors[2:] == [f"interflow: there is no image {files[4]}"]
    classifier = checkpoints.load(checkpoint)
    with torch.no_grad():
        expected = classifier(torch.stack([classifier.preprocessing.read(files[i]) for i in (0, 2, 5)])).softmax(1)
    for row, p in zip(rows, expected, strict=True):
        assert row[1] == str(p.argmax().item()) and float(row[2]) == pytest.approx(p.max().item(), abs=1e-4)


def test_no_good_image_gives_2(command, mixed):
    code, rows, errors = command(mixed / "b.png", mixed / "none.png")
    assert (code, rows, len(errors)) == (2, [], 2)


def test_a_bad_image_suppresses_no_others_of_any_batch(command, digit_files, mixed):
    files = [*digit_files, mixed / "b.png", *digit_files, *[mixed / "none.png"] * 4]
    code, rows, errors = command("--batch-size", 3, *files)
    assert code == 1 and len(errors) == 5
    assert [row[0] for row in rows] == [str(file) for file in [*digit_files, *digit_files]]
    assert rows[:10] == rows[10:]


def test_folders_give_all_their_images(command, mixed):
    code, rows, errors = command(mixed)
    assert code == 1 and len(errors) == 2
    assert [row[0] for row in rows] == [str(mixed / name) for name in ("a.png", "c.png", "e.png", "below/f.png")]


def test_an_empty_folder_is_named(command, digit_files, tmp_path):
    (tmp_path / "empty").mkdir()
    code, rows, errors = command(tmp_path / "empty", digit_files[0])
    assert code == 1 and len(rows) == 1 and errors == [f"interflow: the folder {tmp_path / 'empty'} has no images"]


def test_patterns(command, mixed, tmp_path):
    code, rows, errors = command(mixed / "[ace].png", tmp_path / "*" / "below")
    assert (code, errors) == (0, [])
    assert [row[0] for row in rows] == [str(mixed / name) for name in ("a.png", "c.png", "e.png", "below/f.png")]
    code, rows, errors = command(mixed / "*.gif", mixed / "a.png")
    assert code == 1 and len(rows) == 1 and errors == [f"interflow: no file matches {mixed / '*.gif'}"]
    shutil.copy(mixed / "a.png", mixed / "[x].png")  # a file of that very name is no pattern
    assert command(mixed / "[x].png")[1][0][0] == str(mixed / "[x].png")


def test_pipes_and_standard_input(command, digit_files, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(digit_files[3].read_bytes()), daemon=True)
    writer.start()
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": io.BytesIO(digit_files[4].read_bytes())}))
    code, rows, errors = command(tmp_path / "pipe", "-", digit_files[3], digit_files[4])
    assert (code, errors) == (0, [])
    assert [row[1:] for row in rows[:2]] == [row[1:] for row in rows[2:]] and rows[1][0] == "-"
    writer.join(10)


def test_a_folder_given_by_a_very_long_name_costs_one_line(command, digit_files):
    code, rows, errors = command("x" * 5000, digit_files[0])
    assert code == 1 and len(rows) == 1 and len(errors) == 1 and "File name too long" in errors[0]


@pytest.mark.parametrize("device", ["meta", "nonsense", "cuda:99", "xla"])
def test_devices_that_are_not_here(command, digit_files, device):
    code, rows, errors = command("--device", device, digit_files[0])
    assert (code, rows, len(errors)) == (2, [], 1)
    assert errors[0].startswith(f"interflow: --device {device} is not available here: ")


def test_arguments_that_do_not_fit(command):
    assert command() == (2, [], ["interflow: the following arguments are required: FILES; see `interflow predict --help`"])


def changed(checkpoint, path, change):
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


KEPT = {
    "no preprocessing": ({"preprocessing": None, "class_names": []}, "does not say how its images were prepared: its data module had no attribute"),
    "size 0": ({"preprocessing": {"size": 0, "mean": [0.5] * 3, "std": [1.0] * 3}}, "prepared is broken: size must be at least 1, got 0"),
    "std 0": ({"preprocessing": {"size": 16, "mean": [0.5] * 3, "std": [1.0, 0.0, 1.0]}}, "prepared is broken: std must have finite values above 0"),
    "no mean": ({"preprocessing": {"size": 16, "std": [1.0] * 3}}, "prepared is broken: 'mean' is missing"),
    "no numbers": ({"preprocessing": {"size": 16, "mean": ["x"] * 3, "std": [1.0] * 3}}, "prepared is broken: could not convert"),
    "grey": ({"preprocessing": {"size": 16, "mean": [0.5], "std": [1.0]}}, "its images have 1 channels but its model takes 3"),
    "few names": ({"preprocessing": None, "class_names": ["a", "b"]}, "class_names must be 10 strings, got "),
    "no names": ({"preprocessing": None, "class_names": list(range(10))}, "class_names must be 10 strings, got "),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_checkpoint_with_broken_knowledge_of_its_images(command, checkpoint, digit_files, tmp_path, kind):
    kept, message = KEPT[kind]
    path = changed(checkpoint, tmp_path / "bad.ckpt", lambda content: content.update({CHECKPOINT_KEY: kept}))
    code, rows, errors = command(digit_files[0], ckpt=path)
    assert (code, rows, len(errors)) == (2, [], 1)
    assert str(path) in errors[0] and message in errors[0]


class OwnData(LightningDataModule):
    """A data module as a user writes it."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.rand(8, 3, 16, 16), torch.arange(8) % 2), 4)


def fit(data, folder):
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", default_root_dir=folder, **silent)
    trainer.fit(Classifier(**TINY, num_classes=2), datamodule=data)
    trainer.save_checkpoint(folder / "own.ckpt")
    return folder / "own.ckpt"


def test_a_data_module_of_ones_own_says_how_images_are_prepared(command, digit_files, tmp_path):
    path = fit(OwnData(preprocessing=Preprocessing(16, (0.5,) * 3, (0.5,) * 3), class_names=["cat", "dog"]), tmp_path)
    code, rows, errors = command(*digit_files, ckpt=path)
    assert (code, errors, len(rows)) == (0, [], 10) and {row[1] for row in rows} <= {"cat", "dog"}


def test_a_data_module_without_preprocessing_trains_but_cannot_predict(command, digit_files, tmp_path):
    with pytest.warns(UserWarning, match="OwnData has no attribute `preprocessing`: `interflow predict` cannot classify files"):
        path = fit(OwnData(), tmp_path)
    code, rows, errors = command(digit_files[0], ckpt=path)
    assert (code, rows) == (2, []) and "its data module had no attribute `preprocessing`" in errors[0]


def test_a_network_whose_scores_are_not_finite_gives_no_class(command, checkpoint, digit_files, tmp_path):
    path = changed(checkpoint, tmp_path / "nan.ckpt", lambda content: content["state_dict"]["model.head.weight"].fill_(float("nan")))
    code, rows, errors = command(digit_files[0], ckpt=path)
    assert (code, rows) == (2, []) and "nan.ckpt" in errors[0]


def test_a_batch_has_the_sizes_of_its_images(command, tmp_path):
    for number, size in enumerate(((300, 20), (20, 300), (1, 2000), (16, 16))):
        Image.new("L", size, 60 * number).save(tmp_path / f"{number}.png")
    code, rows, errors = command(tmp_path)
    assert (code, errors, len(rows)) == (0, [], 4)


def probabilities_of(checkpoint, files):
    classifier = checkpoints.load(checkpoint)
    with torch.no_grad():
        return classifier(torch.stack([classifier.preprocessing.read(file) for file in files])).softmax(1)


def test_the_best_few_classes(command, checkpoint, digit_files):
    code, rows, errors = command("--top-k", 3, *digit_files)
    assert (code, errors) == (0, [])
    for row, p in zip(rows, probabilities_of(checkpoint, digit_files), strict=True):
        values, labels = p.topk(3)
        assert len(row) == 7 and row[1::2] == [str(label) for label in labels.tolist()]
        assert [float(value) for value in row[2::2]] == pytest.approx(values.tolist(), abs=1e-4)
    assert len(command("--top-k", 99, digit_files[0])[1][0]) == 21  # all ten classes


def test_csv(command, checkpoint, digit_files, tmp_path):
    odd = tmp_path / 'a, "b".png'
    shutil.copy(digit_files[0], odd)
    code, rows, errors = command("--format", "csv", odd, digit_files[1])
    table = list(csv.reader(row[0] for row in rows))
    assert (code, errors) == (0, []) and table[0] == ["file", "class", "probability"] and table[1][0] == str(odd) and len(table) == 3
    (heads,) = csv.reader([command("--format", "csv", "--top-k", 2, odd)[1][0][0]])
    assert heads == ["file", "class1", "probability1", "class2", "probability2"]


def test_json(command, checkpoint, digit_files, mixed):
    code, rows, errors = command("--format", "json", "--top-k", 2, digit_files[0], mixed / "b.png")
    assert code == 1 and len(errors) == 1 and len(rows) == 1
    found = json.loads(rows[0][0])
    values, labels = probabilities_of(checkpoint, digit_files[:1])[0].topk(2)
    assert found["file"] == str(digit_files[0])
    assert [each["class"] for each in found["classes"]] == [str(label) for label in labels.tolist()]
    assert [each["probability"] for each in found["classes"]] == pytest.approx(values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--top-k", 0), "argument --top-k: must be at least 1, got 0"),
        (("--batch-size", "x"), "argument --batch-size: invalid whole number value: 'x'"),
        (("--format", "xml"), "argument --format: invalid choice: 'xml'"),
    ],
)
def test_options_that_do_not_fit(command, digit_files, arguments, message):
    code, rows, errors = command(*arguments, digit_files[0])
    assert (code, rows, len(errors)) == (2, [], 1) and message in errors[0]


def test_a_compiled_network_gives_the_same_classes(command, digit_files, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    assert command("--compile", *digit_files)[1] == command(*digit_files)[1]
    assert compiled == ["VGG"]


def test_progress_is_for_terminals_whose_output_goes_elsewhere(capsys, monkeypatch):
    from interflow_vision.cli.predictions import Progress

    silent = Progress()
    silent.add(3)
    silent.close()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = Progress()
    shown.add(3)
    shown.close()
    assert "3 images" in capsys.readouterr().err
