"""A line for each epoch where no terminal is."""

import re
import sys

import pytest
from lightning.pytorch import Trainer

from interflow_vision.data.modules import Digits
from interflow_vision.training import progress
from interflow_vision.training.classifier import Classifier

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = re.compile(r"epoch \d/\d   training: loss \d\.\d{3}, accuracy \d+\.\d%(   validation: loss \d\.\d{3}, accuracy \d+\.\d%)?   \d+ images/s   \d+\.\d s")


def run(folder, **options) -> Trainer:
    quick = {"max_epochs": 3, "limit_train_batches": 2, "limit_val_batches": 1, "accelerator": "cpu", "enable_model_summary": False, "logger": False}
    return Trainer(**{**quick, "callbacks": [progress.EpochLines()], "enable_checkpointing": False, "default_root_dir": folder, **options})


def test_a_line_for_each_epoch_with_what_was_logged(tmp_path, capsys):
    trainer = run(tmp_path, check_val_every_n_epoch=2)
    trainer.fit(Classifier(width=0.0625), datamodule=Digits(size=16, batch_size=16))
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert "\r" not in out + err and len(lines) == 3
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert ["validation" in line for line in lines] == [False, True, False]
    seen = trainer.callback_metrics
    assert f"training: loss {seen['train/loss']:.3f}, accuracy {seen['train/accuracy']:.1%}" in lines[2]
    assert f"validation: loss {seen['val/loss']:.3f}, accuracy {seen['val/accuracy']:.1%}" in lines[1]


def test_other_processes_print_nothing(tmp_path, capsys):
    lines = progress.EpochLines()
    lines.disable()
    run(tmp_path, callbacks=[lines], max_epochs=1).fit(Classifier(width=0.0625), datamodule=Digits(size=16, batch_size=16))
    lines.print("nothing")
    assert "epoch " not in capsys.readouterr().out
    lines.enable()
    lines.print("something")
    assert capsys.readouterr().out == "something\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_is_watched(monkeypatch, terminal):
    monkeypatch.setattr(sys, "stdout", type("Stream", (), {"isatty": lambda self: terminal})())
    assert progress.is_watched() == terminal
