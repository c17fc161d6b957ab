"""The guard round the command: which errors are a sentence, which keep their traceback, and the exit codes."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import environment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Dataset

from interflow_vision.cli import command as cli
from interflow_vision.cli import guard
from interflow_vision.data.images import Preprocessing
from interflow_vision.errors import UserError


def throw(error):
    raise error


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Preprocessing(8, (0.5,), (0.5,)).read("nowhere.png")


def no_trainer():
    from lightning.pytorch import Trainer

    Trainer(max_epochs=-7, logger=False, enable_checkpointing=False, accelerator="cpu")


MENDABLE = {
    "own": (lambda: throw(UserError("say so")), "say so"),
    "from a worker process": (lambda: list(DataLoader(Broken(), num_workers=1)), "there is no image nowhere.png"),
    "disk full": (lambda: throw(OSError(errno.ENOSPC, "No space left on device", "a/b")), "a/b: No space left on device; make room"),
    "no folder": (lambda: os.listdir("/proc/self/mem/x"), "/proc/self/mem/x: Not a directory"),
    "memory": (lambda: torch.empty(1 << 50), "memory does not suffice for 4503599627370496 bytes: give a smaller --data.batch_size"),
    "sizes beyond numbers": (lambda: torch.empty(1 << 40, 1 << 40), "memory does not suffice"),
    "memory of python": (lambda: bytearray(1 << 60), "memory does not suffice"),
    "package": (
        lambda: __import__("not_there.at_all"),
        'the command needs the package not_there, which is not installed: pip install "interflow-kernels[train]"',
    ),
    "batch norm": (lambda: torch.nn.BatchNorm2d(3)(torch.rand(1, 3, 1, 1)), "give --data.batch_size 2 or more"),
    "label": (lambda: torch.nn.functional.cross_entropy(torch.rand(2, 3), torch.tensor([0, 3])), "the data set has a label that is no class of the model"),
    "refused by the package": (lambda: Preprocessing(0, (0.5,), (0.5,)), "size must be at least 1, got 0"),
    "refused by Lightning": (no_trainer, "`max_epochs` must be a non-negative integer or -1. You passed in -7."),
}


@pytest.mark.parametrize("kind", MENDABLE)
def test_what_a_user_can_mend_is_one_sentence(kind, capsys):
    fails, message = MENDABLE[kind]
    assert guard.run(fails, "interflow") == guard.USER == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("interflow: ") and message in err, err


FAULTS = {
    "an operation of torch": lambda: torch.rand(2) @ torch.rand(3),
    "a value that python refuses": lambda: int("x"),
    "an assertion": lambda: throw(AssertionError()),
    "an error raised elsewhere": lambda: json.loads("{"),
    "a key": lambda: {}["x"],
    "its own module": lambda: __import__("interflow_vision.nothing"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_only_the_package_can_mend_keeps_its_traceback(kind, capsys, monkeypatch):
    monkeypatch.setattr(guard, "_OWN", (*guard._OWN, "vision"))  # as if this file were the package's
    assert guard.run(FAULTS[kind], "interflow") == guard.FAULT == 70
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("interflow: this is a fault of the package: please report it with the lines above")
    assert "`python -m interflow_kernels.info`" in err


def test_an_error_in_a_users_own_file_names_the_file(capsys):
    assert guard.run(lambda: {}["x"], "interflow") == guard.FAULT
    assert capsys.readouterr().err.splitlines()[-1] == f"interflow: this error comes from {__file__}, which is not part of the package"


def test_lightnings_hints_are_left_out():
    error = MisconfigurationException("this cannot be. HINT: Did you call something else?")
    assert guard._first_sentence(error) == "this cannot be."


def test_interrupted(capsys):
    assert guard.run(lambda: throw(KeyboardInterrupt()), "interflow") == 130
    assert capsys.readouterr().err == "interflow: interrupted\n"


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = f"{sys.executable} -m interflow_vision --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() in ("0", "141") and result.stderr == ""  # 0 where all was written before the reader ended


def test_exit_codes_of_commands(monkeypatch, capsys):
    for arguments, code, said in (
        (["--version"], 0, "torch"),
        (["--help"], 0, "predict    classifies image files"),
        ([], 2, "give a subcommand: fit, validate, test, predict"),
        (["fut"], 2, "there is no subcommand 'fut'"),
    ):
        monkeypatch.setattr(sys, "argv", ["interflow", *arguments])
        assert cli.main() == code
        assert said in "".join(capsys.readouterr())
