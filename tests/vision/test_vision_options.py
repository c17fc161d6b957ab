"""Options of a training, each by what it does: optimiser, schedule, trunk, EMA, precision, layout, checkpointing."""

import copy
import math
import sys

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from short_runs import TINY, data, fitted, trainer
from torch import nn

from interflow_vision import create_model
from interflow_vision.errors import MissingPackageError, UserError
from interflow_vision.training import checkpoints, optimization
from interflow_vision.training.classifier import Classifier
from interflow_vision.training.optimization import Settings

pytestmark = pytest.mark.usefixtures("one_thread")


# optimiser and schedule


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("schedule", optimization.SCHEDULES)
def test_optimiser_and_schedule_by_name(tmp_path, optimizer, schedule):
    seen = []

    class Record(Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = Classifier(**TINY, optimizer=optimizer, schedule=schedule, warmup=0.25)
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, limit_train_batches=8, callbacks=[Record()])
    run.fit(model, datamodule=data())
    assert type(run.optimizers[0]) is {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optimizer]
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    expected = [0.02 * Settings(0.02, 0.9, 0, 0.25, schedule=schedule).factor(step / 8) for step in range(8)]
    assert seen == pytest.approx(expected)


def test_factors_of_schedules():
    factors = lambda **given: [Settings(1.0, 0.9, 0.0, **given).factor(step / 100) for step in range(101)]  # noqa: E731
    cosine = factors(schedule="cosine", warmup=0.1)
    assert cosine[:11] == pytest.approx([1e-3, *(step / 10 for step in range(1, 11))]) and cosine[55] == pytest.approx(0.5) and cosine[100] == pytest.approx(0)
    assert factors(schedule="cosine", warmup=0)[0] == 1
    step = factors(schedule="step", warmup=0, step_at=(0.5, 0.75))
    assert step[0] == step[49] == 1 and step[50] == step[74] == pytest.approx(0.1) and step[75] == step[100] == pytest.approx(0.01)
    assert set(factors(schedule="constant", warmup=0)) == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, "schedule must be one of one_cycle, cosine, step, constant, got 'linear'"),
        ({"step_at": [0.7, 0.5]}, r"step_at must be rising parts of the training, between 0 and 1, got \[0.7, 0.5\]"),
        ({"step_at": [1.0]}, "step_at must be rising parts"),
        ({"trunk_lr": -1.0}, "trunk_lr must be a finite number, at least 0, got -1.0"),
        ({"trunk_lr": math.nan}, "trunk_lr must be a finite number"),
        ({"warmup": 1.0}, "warmup must be a finite number, at least 0 and below 1, got 1.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Classifier(width=0.0625, **options)


def test_other_optimisers_are_timms(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(MissingPackageError, match="optimizer 'lamb' needs timm, which is not installed: take sgd or adamw, or pip install timm"):
        fitted(tmp_path, optimizer="lamb")


def test_lamb_by_timm(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    run = trainer(tmp_path)
    model = fitted(tmp_path, run=run, optimizer="lamb")
    assert type(run.optimizers[0]).__name__ == "Lamb" and run.global_step == 3
    assert [group["weight_decay"] for group in run.optimizers[0].param_groups] == [model.hparams["weight_decay"], 0.0]
    with pytest.raises(ValueError, match=r"optimizer must be sgd, adamw or one of timm's, got 'lamm' \(did you mean lamb\?\)"):
        fitted(tmp_path, optimizer="lamm")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_resumed_run_has_the_settings_that_it_was_given(tmp_path, optimizer):
    run = trainer(tmp_path, max_epochs=2, enable_checkpointing=True, callbacks=[ModelCheckpoint(dirpath=tmp_path, filename="x", save_last=True)])
    fitted(tmp_path, run=run, optimizer=optimizer, trunk_lr=0.5)
    path = tmp_path / "last.ckpt"
    again = trainer(tmp_path, max_epochs=3)
    again.fit(Classifier(**{**TINY, "lr": 0.5}, optimizer=optimizer, trunk_lr=0.5, weight_decay=0.3, schedule="constant", warmup=0), data(), ckpt_path=path)
    groups = again.optimizers[0].param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.25, 0.3), (0.25, 0.0), (0.5, 0.3), (0.5, 0.0)]


# the trunk


def split(state):
    trunk = {name: value for name, value in state.items() if name.startswith("model.features")}
    return trunk, {name: value for name, value in state.items() if name not in trunk}


def test_a_frozen_trunk_stays_as_it_is_its_norms_too(tmp_path):
    model = Classifier(**TINY, trunk_lr=0)
    before = copy.deepcopy(model.state_dict())
    fitted(tmp_path, model)
    for name, value in split(before)[0].items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(not torch.equal(model.state_dict()[name], value) for name, value in split(before)[1].items() if name.endswith("head.weight"))


def test_a_slow_trunk_learns_with_its_own_rate(tmp_path):
    run = trainer(tmp_path)
    model = fitted(tmp_path, run=run, trunk_lr=0.1, schedule="constant", warmup=0)
    groups = run.optimizers[0].param_groups
    assert [group["lr"] for group in groups] == pytest.approx([0.002, 0.002, 0.02, 0.02])
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0, 5e-4, 0.0]
    slow = {id(p) for group in groups[:2] for p in group["params"]}
    assert slow == {id(p) for p in model.model.features.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_trunk_from_another_run_with_other_classes(checkpoint, tmp_path):
    start = torch.load(checkpoint, weights_only=True)["state_dict"]
    model = Classifier(**TINY, num_classes=10, attention="gated", trunk_lr=0, trunk_from=str(checkpoint))
    head = copy.deepcopy(split(model.state_dict())[1])
    assert any(not torch.equal(model.state_dict()[name], value) for name, value in split(start)[0].items())
    run = trainer(tmp_path, max_epochs=0)
    run.fit(model, datamodule=data())
    for name, value in split(start)[0].items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, value in head.items():
        assert torch.equal(model.state_dict()[name], value), name
    with pytest.raises(UserError, match=r"has another trunk than this model: features.0.bias does not fit; give --model.name and --model.width"):
        fitted(tmp_path, width=0.125, trunk_from=str(checkpoint))
    with pytest.raises(UserError, match="there is no checkpoint none.ckpt for --model.trunk_from"):
        fitted(tmp_path, trunk_from="none.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    with pytest.raises(UserError, match="text.ckpt is damaged or not a checkpoint"):
        fitted(tmp_path, trunk_from=str(tmp_path / "text.ckpt"))


# EMA, clipping, accumulation, precision


def test_averaged_weights_are_validated_and_saved(tmp_path):
    weights = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            weights.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    kept = ModelCheckpoint(dirpath=tmp_path, filename="x")
    run = trainer(tmp_path, enable_checkpointing=True, limit_val_batches=1.0, callbacks=[EMAWeightAveraging(decay=0.5), Record(), kept])
    fitted(tmp_path, run=run)
    saved = torch.load(kept.best_model_path, weights_only=True)
    name = "model.head.weight"
    expected = weights[0][name]  # the average begins with the weights of the first step
    for state in weights[1:]:
        expected = 0.5 * expected + 0.5 * state[name]
    torch.testing.assert_close(saved["state_dict"][name], expected)
    assert torch.equal(saved["current_model_state"][name], weights[-1][name])
    logged = run.callback_metrics["val/loss"].item()
    again = trainer(tmp_path, limit_val_batches=1.0).validate(checkpoints.load(tmp_path / "x.ckpt"), data(), verbose=False)[0]["val/loss"]
    assert logged == pytest.approx(again, rel=1e-5)


def test_clipping_and_accumulation(tmp_path):
    norms = []

    class Record(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
            norms.extend([nn.utils.get_total_norm(gradients).item()] if gradients else [])

    run = trainer(tmp_path, limit_train_batches=4, accumulate_grad_batches=2, gradient_clip_val=0.01, callbacks=[Record()])
    fitted(tmp_path, run=run)
    assert run.global_step == 2 and norms and max(norms) <= 0.0101


def test_bf16(tmp_path):
    model = fitted(tmp_path, run=trainer(tmp_path, precision="bf16-mixed"))
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in model.parameters())


# layout, checkpointing, compile


def losses(folder, **options):
    """The losses of a training, and the state that it ends with."""
    seen = []

    class Record(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.append(outputs["loss"].item())

    model = fitted(folder, run=trainer(folder, callbacks=[Record()]), **options)
    return seen, model


@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
@pytest.mark.parametrize("stage", ["fused", "eager"])
def test_checkpointing_changes_no_bit(tmp_path, name, stage):
    plain, model = losses(tmp_path, name=name, stage=stage)
    again, recomputed = losses(tmp_path, name=name, stage=stage, checkpointing=True)
    assert recomputed.model.features.checkpointed and again == plain
    for key, value in model.state_dict().items():
        assert torch.equal(recomputed.state_dict()[key], value), key


def test_checkpointing_keeps_less(tmp_path):
    def kept(checkpointed):
        torch.manual_seed(0)
        net = create_model("vgg16_bn", width=0.0625).train()
        net.features.checkpointed = checkpointed
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = net(torch.randn(4, 3, 32, 32))
        y.sum().backward()
        return total, [p.grad.clone() for p in net.parameters()]

    (less, gradients), (more, plain) = kept(True), kept(False)
    assert less < 0.5 * more
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain, strict=True))


def test_checkpointing_of_a_network_without_blocks():
    from interflow_vision.training.execution import Execution

    with pytest.raises(ValueError, match="checkpointing needs a trunk in blocks, as VGG has; Linear has none"):
        Execution(checkpointing=True).prepare(nn.Linear(1, 1))


def test_channels_last_gives_the_same_numbers(tmp_path):
    plain, _ = losses(tmp_path)
    other, model = losses(tmp_path, channels_last=True)
    assert other == pytest.approx(plain, rel=1e-3)
    weight = [layer for layer in model.model.features.values() if isinstance(layer, nn.Conv2d)][1].weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


@pytest.mark.slow
def test_a_compiled_training_gives_the_same_numbers(tmp_path):
    plain, _ = losses(tmp_path)
    other, model = losses(tmp_path, compile=True)
    assert model.model._compiled_call_impl is not None
    assert other == pytest.approx(plain, rel=1e-3)
    assert all("_orig_mod" not in name for name in model.state_dict())
