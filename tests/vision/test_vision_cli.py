"""The command `interflow` in a process of its own: a whole run, resuming after a kill, and every kind of bad input."""

import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import environment
from PIL import Image

from interflow_vision.errors import UserError
from interflow_vision.reports import curves as report
from interflow_vision.training import checkpoints

QUICK = (
    "--model.width", "0.0625", "--data.init_args.size", "16", "--trainer.limit_train_batches", "4",
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
)  # fmt: skip


def sentence(result: "subprocess.CompletedProcess[str]") -> str:
    """The one line on stderr of a command that was refused."""
    assert result.returncode == 2, result
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stdout
    return lines[0]


@pytest.fixture(scope="module")
def fitted(lightning_cli, interflow, tmp_path_factory):
    """The folder in which `interflow fit` ran for an epoch, and what it said."""
    folder = tmp_path_factory.mktemp("fit")
    result = interflow("fit", *QUICK, "--trainer.max_epochs", 1, cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, result


@pytest.mark.slow
def test_fit_leaves_checkpoints_logs_and_picture(fitted):
    folder, result = fitted
    run = folder / "runs" / "digits" / "version_0"
    assert {path.name for path in run.iterdir() if "tfevents" not in path.name} == {"checkpoints", "config.yaml", "curves.png", "hparams.yaml", "metrics.csv"}
    assert any("tfevents" in path.name for path in run.iterdir())
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert "Test accuracy of runs/digits/version_0/checkpoints/best.ckpt" in result.stdout
    assert "branch 4 alone" in result.stdout
    assert "Curves: runs/digits/version_0/curves.png" in result.stdout
    assert "litlogger" not in result.stdout + result.stderr
    assert "\r" not in result.stdout + result.stderr
    with Image.open(run / "curves.png") as picture:
        assert picture.width > 800 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    log = report.read_log(run)
    assert {"train/images_per_second", "val/accuracy_branch4", "contribution/branch4", "test/accuracy"} <= set(log)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["width"] == 0.0625 and config["model"]["attention"] == "nxn" and config["seed_everything"] == 0
    assert checkpoints.load(run / "checkpoints" / "best.ckpt").hparams["width"] == 0.0625


@pytest.mark.slow
@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test_build_the_checkpoints_model(fitted, interflow, command):
    folder, result = fitted
    before = sorted((folder / "runs").rglob("*"))
    again = interflow(command, "--ckpt_path", "best", "--data.init_args.size", 16, "--trainer.enable_progress_bar", "false", cwd=folder)
    assert again.returncode == 0, again.stderr
    part = {"validate": "val", "test": "test"}[command]
    value = next(line for line in again.stdout.splitlines() if f"{part}/accuracy " in line)
    assert f"{part}/accuracy_branch4" in again.stdout
    if command == "test":
        said = next(line for line in result.stdout.splitlines() if "the model" in line).split()[-1]
        number = float("".join(c for c in value.split("accuracy")[1] if c in "0123456789.e-"))
        assert f"{number:.2%}" == said
    assert sorted((folder / "runs").rglob("*")) == before


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_checkpoint(lightning_cli, interflow, tmp_path):
    endless = [sys.executable, "-m", "interflow_vision", "fit", *QUICK, "--trainer.max_epochs", "1000"]
    last = tmp_path / "runs" / "digits" / "version_0" / "checkpoints" / "last.ckpt"
    process = subprocess.Popen(endless, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 100
        while not last.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert last.is_file()
    reached = torch.load(last, weights_only=True)["epoch"] + 1  # epochs done
    config = tmp_path / "more.yaml"
    config.write_text(f"trainer:\n  max_epochs: {reached + 1}\n")
    result = interflow("fit", "--config", config, *QUICK, "--ckpt_path", "last", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Restored all states from the checkpoint at runs/digits/version_0/checkpoints/last.ckpt" in result.stdout
    assert torch.load(last, weights_only=True)["global_step"] == 4 * (reached + 1)
    assert [path.name for path in (tmp_path / "runs" / "digits").iterdir()] == ["version_0"]
    assert sorted(report.read_log(last.parents[1])["val/loss"])[: reached + 1] == list(range(reached + 1))


def test_predict_prints_file_class_probability(checkpoint, interflow, digit_files, tmp_path):
    result = interflow("predict", "--ckpt", checkpoint, *digit_files, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == [str(file) for file in digit_files]
    classifier = checkpoints.load(checkpoint)
    with torch.no_grad():
        expected = classifier(torch.stack([classifier.preprocessing.read(file) for file in digit_files])).softmax(1)
    for row, p in zip(rows, expected, strict=True):
        assert row[1] == str(p.argmax().item())
        assert float(row[2]) == pytest.approx(p.max().item(), abs=2e-4)


def damaged(content, change):
    change(content)
    return content


BAD_CHECKPOINTS = {
    "missing": (None, "there is no checkpoint"),
    "cut": (lambda raw, _: raw[: len(raw) // 2], "is damaged or not a checkpoint"),
    "text": (lambda raw, _: b"epoch: 3", "is damaged or not a checkpoint"),
    "foreign": (lambda _, content: {"state_dict": content["state_dict"], "epoch": 1}, "is not a checkpoint of `interflow fit`"),
    "unknown model": (
        lambda _, content: damaged(content, lambda c: c["hyper_parameters"].update(name="vgg99")),
        "names a model that this version does not have",
    ),
    "other weights": (lambda _, content: damaged(content, lambda c: c["hyper_parameters"].update(width=0.125)), "holds the weights of another model"),
}


def write_bad(kind, checkpoint, path) -> str:
    """Writes a bad checkpoint made from a good one; returns what should be said about it."""
    make, message = BAD_CHECKPOINTS[kind]
    if make is not None:
        content = make(checkpoint.read_bytes(), torch.load(checkpoint, weights_only=True))
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return message


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_bad_checkpoint(kind, checkpoint, tmp_path):
    message = write_bad(kind, checkpoint, tmp_path / "bad.ckpt")
    with pytest.raises(UserError, match=message) as error:
        checkpoints.load(tmp_path / "bad.ckpt")
    assert len(str(error.value).splitlines()) == 1 and "bad.ckpt" in str(error.value)


@pytest.mark.parametrize("kind", ["missing", "cut", "other weights"])
def test_predict_with_a_bad_checkpoint(kind, checkpoint, interflow, digit_files, tmp_path):
    message = write_bad(kind, checkpoint, tmp_path / "bad.ckpt")
    said = sentence(interflow("predict", "--ckpt", "bad.ckpt", digit_files[0], cwd=tmp_path))
    assert said.startswith("interflow: ") and "bad.ckpt" in said and message in said


def test_predict_with_a_bad_image(checkpoint, interflow, digit_files, tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    result = interflow("predict", "--ckpt", checkpoint, digit_files[0], "notes.txt", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr == "interflow: notes.txt is not an image that Pillow can read\n"
    assert result.stdout.startswith(f"{digit_files[0]}\t") and len(result.stdout.splitlines()) == 1
    assert sentence(interflow("predict", "--ckpt", checkpoint, "notes.txt", cwd=tmp_path)) == "interflow: notes.txt is not an image that Pillow can read"


BAD_RUNS = {
    "missing data set": (("fit", "--data", "interflow_vision.data.ImageFolder", "--data.init_args.root", "nowhere"), "there is no folder nowhere"),
    "unwritable folder": (("fit", "--trainer.default_root_dir", "file/runs"), "the folder file/runs cannot be written"),
    "nothing to resume": (("fit", "--ckpt_path", "last"), "there is no last checkpoint yet"),
    "no checkpoint": (("test",), "`interflow test` needs --ckpt_path"),
    "impossible split": (("fit", "--model.stages", "[4, 4]"), "stages must be 1 to 16 whole numbers"),
    "other classes": (("fit", "--model.num_classes", "7"), "the data set has 10 classes but the model 7"),
}


@pytest.mark.parametrize("kind", BAD_RUNS)
def test_bad_run(kind, lightning_cli, interflow, tmp_path):
    (tmp_path / "file").write_text("")
    arguments, message = BAD_RUNS[kind]
    said = sentence(interflow(*arguments, cwd=tmp_path))
    assert said.startswith("interflow: ") and message in said


def test_without_lightnings_requirements_the_command_says_what_to_install(interflow, tmp_path):
    (tmp_path / "lightning.py").write_text("raise ModuleNotFoundError(\"No module named 'lightning'\", name='lightning')")
    said = sentence(interflow("fit", cwd=tmp_path))
    assert said == 'interflow: the command needs the package lightning, which is not installed: pip install "interflow-kernels[train]"'
