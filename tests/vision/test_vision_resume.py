"""A run that goes on is the run that was never interrupted; what is given beside a checkpoint is followed or refused."""

import random
import re
import signal
import sys

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import Dataset

from interflow_vision.cli import digits, predict
from interflow_vision.cli import fit as training
from interflow_vision.data import random_states as rng
from interflow_vision.data.loading import ResumableLoader
from interflow_vision.data.modules import Digits
from interflow_vision.errors import UserError
from interflow_vision.reports import curves as report
from interflow_vision.training import checkpoints, resume_options, runs
from interflow_vision.training.checkpoint_io import SafeCheckpointIO
from interflow_vision.training.classifier import Classifier
from interflow_vision.training.resume_state import KeepRandomStates
from interflow_vision.training.stopping import StopOnSignal

EPOCHS, BATCHES = 3, 4


class Noise(Dataset):
    """Images that are drawn anew each time, from all three generators, in the process that reads them."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return torch.rand(3, 16, 16) + random.random() + float(np.random.rand()) + i, i % 10


class NoiseData(LightningDataModule):
    """Noise with workers."""

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Noise(), 8, shuffle=True, num_workers=2)

    def val_dataloader(self) -> ResumableLoader:
        return ResumableLoader(Noise(), 16)


class Interrupt(Callback):
    """Ends the training after a batch: by an error, as a kill would, or by a signal."""

    def __init__(self, epoch: int, batch: int, signum: int | None) -> None:
        self.place, self.signum = (epoch, batch), signum

    def on_train_batch_end(self, trainer, *_) -> None:
        if (trainer.current_epoch, trainer.fit_loop.batch_idx) == self.place:
            if self.signum is None:
                raise RuntimeError("killed")
            signal.raise_signal(self.signum)


def fit(folder, data=None, ckpt_path=None, interrupt=None, resumed=None, step=None, **options):
    """A run below `folder`; returns trainer and model."""
    seed_everything(7, workers=True, verbose=False)
    callbacks = [ModelCheckpoint(monitor="val/loss", filename="best", save_last=True, enable_version_counter=False), KeepRandomStates(), StopOnSignal()]
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "log_every_n_steps": 1}
    trainer = Trainer(
        max_epochs=EPOCHS, limit_train_batches=BATCHES, limit_val_batches=1, plugins=[SafeCheckpointIO()],
        logger=runs.loggers(folder, resumed, step), callbacks=[*([] if interrupt is None else [interrupt]), *callbacks], **silent, **options,
    )  # fmt: skip
    model = Classifier(width=0.02, lr=0.02)
    trainer.fit(model, datamodule=data or Digits(size=16, batch_size=16), ckpt_path=ckpt_path)
    return trainer, model


def everything(trainer, model) -> dict[str, torch.Tensor]:
    """Weights, buffers, momentum and learning rates."""
    found = dict(model.state_dict())
    for i, (key, state) in enumerate(trainer.optimizers[0].state_dict()["state"].items()):
        found[f"momentum {key} {i}"] = state["momentum_buffer"]
    found["lr"] = torch.tensor([group["lr"] for group in trainer.optimizers[0].param_groups], dtype=torch.float64)
    return found


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """What a run gives that is not interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("unbroken")
    trainer, model = fit(folder)
    return everything(trainer, model), folder / "version_0"


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


INTERRUPTS = {
    "killed in the first epoch's successor": Interrupt(1, 2, None),
    "killed after an epoch's last batch": Interrupt(1, BATCHES - 1, None),
    "signal in the middle of the first epoch": Interrupt(0, 1, signal.SIGTERM),
    "signal in the middle of an epoch": Interrupt(1, 1, signal.SIGTERM),
    "signal at an epoch's last batch": Interrupt(1, BATCHES - 1, signal.SIGINT),
}


@pytest.mark.parametrize("kind", INTERRUPTS)
def test_a_resumed_run_has_the_bits_of_the_unbroken_one(kind, unbroken, tmp_path):
    expected, folder = unbroken
    interrupt = INTERRUPTS[kind]
    with pytest.raises((RuntimeError, SystemExit)) as error:
        fit(tmp_path, interrupt=interrupt)
    if interrupt.signum is not None:
        assert error.value.code == 128 + interrupt.signum
    run = tmp_path / "version_0"
    step = checkpoints.read(run / "checkpoints" / "last.ckpt")["global_step"]
    epoch, batch = interrupt.place
    assert step == (epoch * BATCHES if interrupt.signum is None else epoch * BATCHES + batch + 1)
    got = everything(*fit(tmp_path, ckpt_path=run / "checkpoints" / "last.ckpt", resumed=run, step=step))
    assert_same(got, expected)
    # the logs
    log, whole = report.read_log(run), report.read_log(folder)
    for key in ("val/loss", "val/accuracy"):
        assert log[key] == whole[key]
    if interrupt.signum is None:
        assert log["train/loss"] == whole["train/loss"]
    events = {}
    for name, where in (("resumed", run), ("unbroken", folder)):
        accumulator = EventAccumulator(str(where)).Reload()
        events[name] = [(event.step, event.value) for event in accumulator.Scalars("val/loss")]
        for tag in accumulator.Tags()["scalars"]:
            steps = [event.step for event in accumulator.Scalars(tag)]
            assert steps == sorted(steps), (name, tag)
            assert tag == "epoch" or len(set(steps)) == len(steps), (name, tag)  # training and validation both log the epoch
    assert events["resumed"] == events["unbroken"]


def test_workers_draw_the_same_after_a_resume(tmp_path):
    expected = everything(*fit(tmp_path / "unbroken", data=NoiseData()))
    for place, signum in (((1, 1), signal.SIGTERM), ((2, 0), None)):
        root = tmp_path / str(place)
        with pytest.raises((RuntimeError, SystemExit)):
            fit(root, data=NoiseData(), interrupt=Interrupt(*place, signum))
        got = everything(*fit(root, data=NoiseData(), ckpt_path=root / "version_0" / "checkpoints" / "last.ckpt", resumed=root / "version_0"))
        assert_same(got, expected)


def test_states_of_all_generators_come_back():
    kept = rng.states()
    drawn = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()]
    torch.save(kept, buffer := __import__("io").BytesIO())
    buffer.seek(0)
    rng.restore(torch.load(buffer, weights_only=True))
    assert [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()] == drawn


def test_a_loader_goes_on_after_the_batches_that_were_used():
    data = list(range(20))
    loader = ResumableLoader(data, 2, shuffle=True)
    torch.manual_seed(3)
    passed = iter(loader)
    first = [next(passed) for _ in range(4)]
    state = loader.state_dict()
    rest = list(passed)
    again = ResumableLoader(data, 2, shuffle=True)
    again.load_state_dict(state)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    went_on = iter(again)
    third = next(went_on)
    assert torch.equal(torch.get_rng_state(), before)  # the pass has its own numbers
    assert [batch.tolist() for batch in [third, *went_on]] == [batch.tolist() for batch in rest]
    assert sorted(int(i) for batch in first + rest for i in batch) == data
    assert len(list(again)) == 10  # the next pass is a whole one


# options beside a checkpoint


@pytest.fixture
def command(lightning_cli, tmp_path, monkeypatch):
    """command(*arguments) runs `interflow` in this process, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "quiet", lambda: None)
    quick = ("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false")
    limits = ("--trainer.limit_train_batches", "2", "--trainer.limit_test_batches", "2")

    def run(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["interflow", *map(str, arguments), *quick, *(limits if arguments[0] == "fit" else ())])
        training.run()

    return run


NEW = ("--model.width", 0.02, "--data.size", 16, "--data.batch_size", 32, "--trainer.max_epochs", 1)


def test_options_beside_a_checkpoint(command, tmp_path, capfd):
    command("fit", *NEW)
    run = tmp_path / "runs" / "digits" / "version_0"
    config = (run / "config.yaml").read_text()
    refused = {
        (
            "fit",
            "--model.width",
            0.04,
        ): r"--model.width 0.04 cannot be combined with --ckpt_path: the checkpoint's model has 0.02; leave --model.width away, or train anew",
        ("fit", "--model.width", 0.25): "--model.width 0.25 cannot",  # the default of a new run
        ("fit", "--model.attention", "gated"): "--model.attention gated .* has nxn",
        ("fit", "--model.stages", "[4,3,3,3]"): "--model.stages",
        ("fit", "--data.size", 32): "--data.size 32 .* the run has 16",
        ("fit", "--data.batch_size", 8): "--data.batch_size 8 .* the run has 32",
        ("fit", "--data", "interflow_vision.data.ImageFolder", "--data.root", "x"): "the run's data set is interflow_vision.data.Digits",
        ("test", "--model.head", "eager"): "--model.head eager .* has fused",
        ("test", "--data.size", 32): "--data.size 32",
        ("validate", "--data.seed", 5): "--data.seed 5",
    }
    for (name, *given), message in refused.items():
        with pytest.raises(UserError, match=message) as error:
            command(name, "--ckpt_path", "last", *given)
        assert len(str(error.value).splitlines()) == 1
    assert (run / "config.yaml").read_text() == config and not list(run.glob("metrics_*.csv"))
    # the run's own data, and what may differ
    capfd.readouterr()
    command("test", "--ckpt_path", "best", "--data.batch_size", 100)
    command("test", "--ckpt_path", run)
    command("test", "--ckpt_path", run / "checkpoints" / "best.ckpt", "--data.size", 16, "--model.width", 0.02)
    tables = re.findall(r"test/loss\W+([0-9.]+)", capfd.readouterr().out)
    classifier, data = checkpoints.load(run / "checkpoints" / "best.ckpt"), Digits(size=16)
    data.setup()
    with torch.no_grad():
        x, target = data.parts[2].tensors
        loss = torch.nn.functional.cross_entropy(classifier(x), target).item()
    assert len(tables) == 3 and [float(value) for value in tables] == pytest.approx([loss] * 3, rel=1e-5)


def test_a_resumed_run_follows_what_changes_its_training_and_keeps_the_rest(command, tmp_path, monkeypatch):
    command("fit", *NEW, "--trainer.gradient_clip_val", 3, "--model.label_smoothing", 0.2)
    run = tmp_path / "runs" / "digits" / "version_0"
    (tmp_path / "runs" / "digits" / "version_1").mkdir()  # a run that has no checkpoint yet
    said: list[str] = []
    monkeypatch.setattr(training, "rank_zero_info", said.append)
    command("fit", "--ckpt_path", "last", "--model.lr", 0.001, "--model.weight_decay", 0, "--trainer.max_epochs", 2)
    assert said == ["--model.lr is 0.001 from here on, it was 0.05", "--model.weight_decay is 0.0 from here on, it was 0.0005"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["model"]["lr"], config["model"]["width"], config["model"]["label_smoothing"]) == (0.001, 0.02, 0.2)
    assert config["data"]["init_args"]["size"] == 16 and config["trainer"]["gradient_clip_val"] == 3
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"]["lr"] == 0.001 and content["global_step"] == 4
    groups = content["optimizer_states"][0]["param_groups"]
    assert all(group["initial_lr"] == 0.001 and group["lr"] <= 0.001 and group["weight_decay"] == 0 for group in groups)
    assert content["lr_schedulers"][0]["base_lrs"] == [0.001, 0.001]
    assert sorted(report.read_log(run)["val/loss"]) == [0, 1]


def test_the_data_of_an_own_class_come_from_the_runs_file(tmp_path):
    (tmp_path / "config.yaml").write_text("data:\n  class_path: mine.Data\n  init_args: {size: 9}\n")
    content = {"hyper_parameters": {"width": 0.5, "_instantiator": "x"}}
    assert resume_options.kept(content, tmp_path) == {"model": {"width": 0.5}, "data": {"class_path": "mine.Data", "init_args": {"size": 9}}}
    assert resume_options.kept(content, None) == {"model": {"width": 0.5}}


@pytest.mark.parametrize(("option", "message"), [({"size": 32}, "prepares images as .*size=32.* expects .*size=16"), ({}, "classes are a, b")])
def test_data_that_contradict_the_checkpoint_are_refused(option, message, checkpoint, tmp_path):
    data = Digits(**{"size": 16, **option})
    if not option:
        data.class_names = tuple("abcdefghij")
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=message):
        trainer.test(Classifier(width=0.0625), datamodule=data, ckpt_path=checkpoint, verbose=False)


# which checkpoint


def test_names_of_checkpoints(tmp_path):
    for name in ("version_2/checkpoints/last.ckpt", "version_10/checkpoints/best.ckpt", "version_10/checkpoints/last.ckpt", "version_9/checkpoints/best.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "version_10" / "checkpoints" / "last.ckpt").unlink()
    (tmp_path / "version_11").mkdir()
    assert runs.checkpoint("last", tmp_path) == tmp_path / "version_2" / "checkpoints" / "last.ckpt"
    assert runs.checkpoint("best", tmp_path) == tmp_path / "version_10" / "checkpoints" / "best.ckpt"
    assert runs.checkpoint(str(tmp_path / "version_2"), tmp_path, "best").name == "last.ckpt"
    assert runs.checkpoint(str(tmp_path / "version_9"), tmp_path, "last").name == "best.ckpt"
    assert runs.checkpoint("some/file.ckpt", tmp_path).name == "file.ckpt"
    with pytest.raises(UserError, match=r"version_11 is not that of a run"):
        runs.checkpoint(str(tmp_path / "version_11"), tmp_path)
    last = tmp_path / "version_2" / "checkpoints" / "last.ckpt"
    assert runs.goes_on_in(last) == runs.goes_on_in(last.with_name("last.ckpt.before")) == tmp_path / "version_2"
    assert runs.goes_on_in(last.with_name("best.ckpt")) is None and runs.goes_on_in(tmp_path / "last.ckpt") is None


def test_the_default_folder_of_runs_is_that_of_the_file():
    assert yaml.safe_load(digits.CONFIG.read_text())["trainer"]["default_root_dir"] == str(runs.ROOT)


def test_predict_takes_names_and_folders(checkpoint, digit_files, tmp_path, monkeypatch, capsys):
    where = tmp_path / "runs" / "digits" / "version_4" / "checkpoints" / "best.ckpt"
    where.parent.mkdir(parents=True)
    where.write_bytes(checkpoint.read_bytes())
    monkeypatch.chdir(tmp_path)
    outputs = []
    for given in (["best"], [str(where)], [str(where.parents[1])], ["best", "--root", str(tmp_path / "runs" / "digits")]):
        predict.main(["--ckpt", *given, str(digit_files[0])])
        outputs.append(capsys.readouterr().out)
    assert outputs[0].count("\t") == 2 and len(set(outputs)) == 1
    with pytest.raises(UserError, match="there is no last checkpoint yet"):
        predict.main(["--ckpt", "last", str(digit_files[0])])
