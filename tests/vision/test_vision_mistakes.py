"""Ordinary mistakes on the command line, all in this process: each is one sentence and exit code 2, or simply works; and the help."""

import re
import sys

import pytest
import torch
from PIL import Image

from interflow_vision.cli import command as cli
from interflow_vision.cli import options
from interflow_vision.errors import UserError
from interflow_vision.training import checks
from interflow_vision.training.classifier import Classifier

QUICK = (
    "--model.width", "0.0625", "--data.size", "16", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
    "--trainer.limit_test_batches", "1", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false",
)  # fmt: skip
FOLDER = ("--data", "ImageFolder", "--data.root", "images", "--data.num_workers", "0", "--model.num_classes", "2")


pytestmark = pytest.mark.filterwarnings("ignore")  # pytest would list Lightning's; the command's own way with warnings is another test


@pytest.fixture
def command(lightning_cli, one_thread, monkeypatch, capfd, tmp_path):
    """command(*arguments): exit code, stdout, stderr, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["interflow", *map(str, arguments)])
        try:
            code = cli.main()
        except SystemExit as end:  # --help
            code = end.code
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def images(tmp_path):
    for part in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / "images" / part / label / f"{i}.png")
    return tmp_path / "images"


MISTAKES = {
    "size": (("--data.size", 8), "images of 8 pixels a side are too small for this model's max-pools: give --data.size 16 or more"),
    "in_channels": (("--model.in_channels", 1), "the data set's images have 3 channels but the model takes 1: give --model.in_channels 3"),
    "lr": (("--model.lr", -1), "lr must be a finite number, above 0, got -1.0"),
    "nan": (("--model.lr", "nan"), "--model.lr: expected float, got nan"),
    "momentum": (("--model.momentum", 1), "momentum must be a finite number, at least 0 and below 1, got 1.0"),
    "label_smoothing": (("--model.label_smoothing", 2), "label_smoothing must be a finite number, at least 0 and below 1, got 2.0"),
    "batch_size": (("--data.batch_size", 0), "batch_size must be at least 1, got 0"),
    "augmentation": (("--data.scale", 1), "scale must be below 1, got 1.0"),
    "width": (("--model.width", 1e9), "memory does not suffice for 6912000000000 bytes: give a smaller"),
    "width 0": (("--model.width", 0), "width must be a finite number, above 0, got 0.0"),
    "device": (("--trainer.accelerator", "meta"), "You selected an invalid accelerator name: `accelerator='meta'`"),
    "devices": (("--trainer.accelerator", "cpu", "--trainer.devices", -3), "`devices` selected with `CPUAccelerator` should be an int > 0"),
    "monitor": ((*QUICK, "--checkpoint.monitor", "val_loss"), "ModelCheckpoint monitors 'val_loss', which nothing logs; there are contribution/branch1"),
    "late monitor": (
        (*QUICK, "--checkpoint.monitor", "val_loss", "--trainer.num_sanity_val_steps", 0),
        "`ModelCheckpoint(monitor='val_loss')` could not find the monitored key in the returned metrics",
    ),
    "interval": ((*QUICK, "--trainer.val_check_interval", 100), "`val_check_interval` (100) must be less than or equal to the number of the training batches"),
    "option": (("--model.widht", 1), "unrecognized arguments: --model.widht 1 (did you mean --model.width?); see `interflow fit --help`"),
    "data's option": (("--data.sizee", 1), "--data: Digits does not take this: Option 'sizee' is not accepted (did you mean --data.size?)"),
    "number": (("--model.lr", "abc"), "--model.lr: expected float, got abc; see `interflow fit --help`"),
    "data's number": (("--data.size", "abc"), "--data.size: expected int, got abc; see `interflow fit --help`"),
    "choice": (("--model.head", "x"), "--model.head: expected one of 'fused', 'eager', 'auxiliary', 'concat', 'last', got x; see"),
    "class": (("--data", "Nope"), "--data: expected one of LightningDataModule, null, got Nope; see"),
    "callback": (("--trainer.callbacks+=EarlyStoppin",), "--trainer.callbacks: expected one of list[Callback], Callback, null, got EarlyStoppin; see"),
    "config": (("--config", "none.yaml"), "--config: File does not exist: "),
    "root": (("--data", "ImageFolder"), "--data: ImageFolder does not take this: the following arguments are required: root"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_sentence(command, kind):
    arguments, message = MISTAKES[kind]
    code, _, err = command("fit", *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1 and err.startswith("interflow: ") and message in err, err


FOLDER_MISTAKES = {
    "std": (("--data.std", "[0,0,0]"), "std must have finite values above 0, got [0.0, 0.0, 0.0]"),
    "lengths": (("--data.mean", "[0.5]"), "mean and std must both have 1 value (grey images) or both 3 (RGB), got 1 and 3"),
    "grey": (("--data.mean", "[0.5]", "--data.std", "[0.5]"), "the data set's images have 1 channels but the model takes 3: give --model.in_channels 1"),
    "rgb": (("--model.in_channels", 1), "give --model.in_channels 3, or --data.mean and --data.std of one value each, for grey images"),
    "one image": (("--data.batch_size", 1), "the batch norm needs more than one value for each channel"),
    "workers": (("--data.num_workers", -1), "num_workers must be at least 0, got -1"),
}


@pytest.mark.parametrize("kind", FOLDER_MISTAKES)
def test_a_mistake_with_a_folder_of_images_is_one_sentence(command, images, kind):
    arguments, message = FOLDER_MISTAKES[kind]
    code, _, err = command("fit", *FOLDER, *QUICK, *arguments)
    assert code == 2
    assert len(err.splitlines()) == 1 and message in err, err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_in_training_is_one_sentence(command, images, workers):
    (images / "train" / "bee" / "0.png").write_text("no image")
    code, _, err = command("fit", *FOLDER, *QUICK, "--data.num_workers", workers, "--data.batch_size", 4)
    assert code == 2
    assert "interflow: images/train/bee/0.png is not an image that Pillow can read" in err.splitlines()
    assert "Traceback" not in err


def test_grey_images_train_as_grey(command, images):
    code, out, err = command("fit", *FOLDER, *QUICK, "--data.mean", "[0.5]", "--data.std", "[0.5]", "--model.in_channels", 1)
    assert code == 0 and "Traceback" not in err
    assert len(re.findall(r"^epoch 1/1   training: loss ", out, re.MULTILINE)) == 1 and "\r" not in out + err


def test_barebones_and_no_checkpoints_work(command, tmp_path):
    assert command("fit", *QUICK, "--trainer.barebones", "true")[0] == 0
    code, _, err = command("fit", *QUICK, "--trainer.enable_checkpointing", "false")
    assert code == 0 and "Traceback" not in err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_fewer_epochs_than_a_checkpoint_has_are_refused(tmp_path):
    content = {"loops": {"fit_loop": {"epoch_progress": {"current": {"ready": 3}}}}}
    with pytest.raises(UserError, match=r"a.ckpt has come to epoch 3 already, so --trainer.max_epochs 2 leaves nothing to train: give more"):
        checks.require_epochs_left(tmp_path / "a.ckpt", content, 2)
    for enough in (3, 4, -1, None):
        checks.require_epochs_left(tmp_path / "a.ckpt", content, enough)


def test_epochs_of_a_real_checkpoint(command):
    assert command("fit", *QUICK, "--trainer.max_epochs", 2)[0] == 0
    content = torch.load("runs/digits/version_0/checkpoints/last.ckpt", weights_only=True)
    with pytest.raises(UserError, match="has come to epoch 2 already"):
        checks.require_epochs_left("last.ckpt", content, 1)
    code, _, err = command("fit", *QUICK, "--ckpt_path", "last")
    assert code == 2 and err.startswith("interflow: ") and "has come to epoch 2 already, so --trainer.max_epochs 1 leaves nothing to train" in err


@pytest.mark.parametrize("option", ["lr", "momentum", "weight_decay", "label_smoothing", "auxiliary_weight", "width", "warmup"])
def test_numbers_that_are_none_are_refused(option):
    for value in (float("nan"), float("inf"), -1.0):
        with pytest.raises(ValueError, match=f"{option} must be a finite number, .*, got {value}"):
            Classifier(**{"width": 0.0625, option: value})


def test_the_short_help_begins_with_model_and_data(command):
    code, out, err = command("fit", "--help")
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert len(lines) < 170 and lines[0] == "usage: interflow fit [options]"
    places = [out.index(word) for word in ("--model.name", "--model.width", "--data.batch_size", "--data.root", "--trainer.max_epochs", "--help-all")]
    assert places == sorted(places)
    assert "default: 0.25" in out  # digits.yaml's, not the class's
    assert all(f"--{name} " in out for name in options.OFTEN)
    code, out, _ = command("fit", "--help-all")
    assert code == 0 and "--trainer.detect_anomaly" in out and "--checkpoint.save_top_k" in out and len(out.splitlines()) > 500
    code, out, _ = command("test", "--help")
    assert code == 0 and out.startswith("usage: interflow test [options]\n\nEvaluates the checkpoint")


def test_every_option_of_the_short_help_exists(command):
    out = command("fit", "--help-all")[1]
    assert [name for name in options.OFTEN if f"--{name} " not in out] == []
