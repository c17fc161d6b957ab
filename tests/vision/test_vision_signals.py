"""What a training tells: gradient norms, learning rate, top-5, the wait for images, the bar; and the learning-rate finder."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from short_runs import TINY, data, fitted, trainer
from torch import nn

from interflow_vision import create_model
from interflow_vision.data.modules import Digits
from interflow_vision.training import bar, optimization, signals, throughput
from interflow_vision.training.classifier import Classifier

pytestmark = pytest.mark.usefixtures("one_thread")


# what is logged


def test_gradient_norms_and_learning_rate(tmp_path):
    norms = {}

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for name, members in signals.parts(pl_module.model).items():
                norms.setdefault(name, []).append(torch.cat([p.grad.flatten() for p in members]).norm().item())

    run = trainer(tmp_path, callbacks=[signals.GradientNorms(), Record()], gradient_clip_val=1e-3)
    fitted(tmp_path, run=run)
    assert set(norms) == {"stage1", "stage2", "stage3", "stage4", "head"}
    for name, values in norms.items():
        assert run.callback_metrics[f"gradient_norm/{name}"].item() == pytest.approx(sum(values) / 3, rel=1e-4)
    assert run.callback_metrics["learning_rate"].item() == pytest.approx(0.02 * optimization.one_cycle(2 / 3, 0.25))


def test_parts_have_every_parameter_once():
    for stages in (None, [2, 11], [13]):
        net = create_model("vgg16_bn", width=0.0625, stages=stages)
        found = signals.parts(net)
        assert list(found) == [*(f"stage{i}" for i in range(1, len(stages or (4, 3, 3, 3)) + 1)), "head"]
        assert sorted(id(p) for members in found.values() for p in members) == sorted(id(p) for p in net.parameters())
        assert all(found.values())
    assert set(signals.parts(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))) == {"0", "1"}


def test_top5_where_there_are_many_classes(tmp_path):
    run = trainer(tmp_path)
    model = Classifier(**TINY, num_classes=20)

    class Many(Digits):
        class_names = ()

    run.fit(model, datamodule=Many(size=16, batch_size=16))
    assert 0 <= run.callback_metrics["val/accuracy"] <= run.callback_metrics["val/top5"] <= 1
    fitted(tmp_path, run=(run := trainer(tmp_path)))
    assert "val/top5" not in run.callback_metrics


# reading


def test_the_wait_for_images_is_measured_and_told(tmp_path, monkeypatch):
    import time

    class Slow(Digits):
        def setup(self, stage=None):
            super().setup(stage)
            part = self.parts[0]

            class Reads:
                __len__ = lambda _: 64  # noqa: E731

                def __getitem__(self, i):
                    time.sleep(0.01)
                    return part[i]

            self.parts[0] = Reads()

    said = []
    monkeypatch.setattr(throughput, "rank_zero_info", said.append)
    wait = throughput.DataWait()
    run = trainer(tmp_path, limit_train_batches=4, max_epochs=1, callbacks=[wait])
    run.fit(Classifier(**TINY), datamodule=Slow(size=16, batch_size=16))
    assert wait.images == 48 and wait.waited > 0.4
    assert run.callback_metrics["train/data_wait"].item() == pytest.approx(wait.share, rel=1e-3)
    assert said == []  # less than two seconds are no measurement
    wait.stepped += 2
    wait.waited += 2
    wait.on_train_epoch_end(run, run.lightning_module)
    wait.on_train_epoch_end(run, run.lightning_module)
    assert len(said) == 1 and said[0].startswith("reading images limits this training: steps wait ")


def test_the_number_of_workers_that_would_help():
    # 1000 images read in 8 s, trained in 2 s: alone it takes 4 readers to keep up
    assert throughput.sentence(1000, 8.0, 2.0, 0, 16) == (
        "reading images limits this training: steps wait 80% of the time; they take 500 images/s and get 100 from no workers; "
        "about --data.num_workers 4 would keep up"
    )
    assert "get 100 from 2 workers; about --data.num_workers 10 would keep up, more than this machine's 4 cores" in throughput.sentence(1000, 8.0, 2.0, 2, 4)
    assert "from 1 worker; about --data.num_workers 2" in throughput.sentence(1000, 5.0, 5.0, 1, 4)


def test_the_bar_of_a_terminal(tmp_path, capsys):
    pytest.importorskip("rich", reason="the package rich is not installed")
    shown = []

    class Bar(bar.TrainingBar):
        def get_metrics(self, *given):
            shown.append(super().get_metrics(*given))
            return shown[-1]

    run = trainer(tmp_path, enable_progress_bar=True, callbacks=[Bar(), throughput.DataWait()])
    run.fit(Classifier(**TINY), datamodule=data())
    capsys.readouterr()
    last = shown[-1]
    assert int(last["images/s"]) > 0 and last["wait"].endswith("%") and last["left"] == "0:00:00" and "v_num" not in last
    assert bar.seconds_left(10, 5.0, 30) == 15 and bar.seconds_left(0, 5.0, 30) is None and bar.seconds_left(10, 5.0, math.inf) is None


# the learning-rate finder


def test_lightnings_finder_sets_the_rate_that_training_takes(tmp_path, capsys):
    seen = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            seen.append((pl_module.lr, trainer.optimizers[0].param_groups[0]["initial_lr"]))

    finder = LearningRateFinder(min_lr=1e-5, max_lr=1.0, num_training_steps=20)
    run = trainer(tmp_path, callbacks=[finder, Record(), signals.GradientNorms(), throughput.DataWait()], limit_train_batches=30)
    run.fit(model := Classifier(**TINY), datamodule=data())
    capsys.readouterr()
    found = finder.optimal_lr
    rates = found.results["lr"]
    assert rates[0] < 1e-4 and rates[-1] > 0.1 and rates == sorted(rates)
    suggestion = found.suggestion()
    assert suggestion is not None and suggestion != 0.02
    assert seen[0][0] == pytest.approx(suggestion) and seen[0][1] == pytest.approx(suggestion) and model.hparams["lr"] == pytest.approx(suggestion)
