"""The whole command in two processes on the CPU (gloo): its end, its averages, a signal, and the bits of a resumed run."""

import csv
import re
import sys

import pytest
import torch
from conftest import environment

from interflow_vision.reports import curves as report

OPTIONS = (
    "--data.size", "16", "--data.batch_size", "16", "--model.width", "0.02", "--trainer.max_epochs", "2", "--trainer.limit_train_batches", "4",
    "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp",
)  # fmt: skip

CALLBACKS = '''
import os, signal
import torch
from lightning.pytorch import Callback

class Record(Callback):
    """Writes each process's losses into a file."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with open(f"losses{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.current_epoch} {outputs['loss'].item()}\\n")

class Stop(Callback):
    """The first process gets a signal after the second batch of the second epoch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.is_global_zero and (trainer.current_epoch, batch_idx) == (1, 1):
            signal.raise_signal(signal.SIGTERM)

class Spoil(Callback):
    """A batch of the second process is not finite."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 2:
            batch[0][0] = float("nan")
'''


@pytest.fixture(scope="module")
def two(lightning_cli, tmp_path_factory):
    """two(folder, arguments...): the command in two processes, with the callbacks above in its folder."""
    import subprocess

    def run(name: str, *arguments: str) -> tuple["subprocess.CompletedProcess[str]", object]:
        folder = base / name
        folder.mkdir(exist_ok=True)
        (folder / "given.py").write_text(CALLBACKS)
        variables = {**environment(), "OMP_NUM_THREADS": "1"}
        variables["PYTHONPATH"] += f":{folder}"
        command = [sys.executable, "-m", "interflow_vision", *arguments]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=400), folder

    base = tmp_path_factory.mktemp("two")
    return run


@pytest.fixture(scope="module")
def unbroken(two):
    return two("unbroken", "fit", *OPTIONS, "--trainer.callbacks+=given.Record")


@pytest.mark.slow
def test_fit_in_two_processes_reaches_its_end(unbroken):
    result, folder = unbroken
    assert result.returncode == 0, result.stderr
    run = folder / "runs" / "digits" / "version_0"
    assert (run / "curves.png").is_file() and "Test accuracy of" in result.stdout
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    losses = [[float(line.split()[1]) for line in (folder / f"losses{rank}.txt").read_text().splitlines()] for rank in (0, 1)]
    assert losses[0] != losses[1]
    logged = report.read_log(run)["train/loss"]
    for epoch in (0, 1):
        both = [loss for each in losses for loss in each[4 * epoch : 4 * epoch + 4]]
        assert logged[epoch] == pytest.approx(sum(both) / 8, rel=1e-5)


@pytest.mark.slow
def test_a_signal_stops_both_processes_and_the_resumed_run_has_the_same_bits(two, unbroken):
    result, folder = two("stopped", "fit", *OPTIONS, "--trainer.callbacks+=given.Stop")
    assert result.returncode == 143, result.stderr
    last = result.stderr.splitlines()[-1]
    command = re.fullmatch(r"interflow: stopped by SIGTERM in epoch 1, after step 6; go on with: interflow (fit --ckpt_path \S+)", last)
    assert command, result.stderr
    result, folder = two("stopped", *command[1].split())
    assert result.returncode == 0, result.stderr
    paths = [where / "runs" / "digits" / "version_0" for where in (folder, unbroken[1])]
    got, expected = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in paths)
    for name, value in expected["state_dict"].items():
        assert torch.equal(got["state_dict"][name], value), name
    for i, state in expected["optimizer_states"][0]["state"].items():
        assert torch.equal(got["optimizer_states"][0]["state"][i]["momentum_buffer"], state["momentum_buffer"]), i
    with (paths[0] / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == sorted(steps) and max(steps) == 8


@pytest.mark.slow
def test_a_loss_that_is_not_finite_in_one_process_stops_both(two):
    result, folder = two("spoiled", "fit", *OPTIONS, "--trainer.callbacks+=given.Spoil")
    assert result.returncode == 2, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("interflow: ")]
    assert len(said) == 1 and "Traceback" not in result.stderr
    assert "nan at step 2 (epoch 0, batch 2): branch 1 of 4 is the first" in said[0] and "images are not finite" in said[0]
    assert not list((folder / "runs").rglob("*.ckpt"))
