"""The trainer: contributions, what is logged, checkpoints, resuming, the report and the demo's parts."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from interflow_kernels import FusedInterflowHead, InterflowHead, StageTap
from interflow_vision.cli import demo, digits
from interflow_vision.data.modules import Digits
from interflow_vision.errors import UserError
from interflow_vision.models.heads import HEADS
from interflow_vision.reports import comparison, timing
from interflow_vision.reports import curves as report
from interflow_vision.reports.contribution import Contribution, branch_terms
from interflow_vision.training import checkpoints, runs
from interflow_vision.training.classifier import CHECKPOINT_KEY, Classifier
from interflow_vision.training.optimization import one_cycle

TINY = {"width": 0.0625, "lr": 0.02}


def trainer(folder, **options) -> Trainer:
    quick = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2, "limit_test_batches": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return Trainer(**{**quick, **silent, "logger": False, **options})


def data(**options) -> Digits:
    return Digits(**{"size": 32, "batch_size": 16, **options})


# contributions


def scored_head(attention: str) -> tuple[InterflowHead, list[Tensor]]:
    torch.manual_seed(0)
    head = InterflowHead((3, 5, 4), 6, attention, attention_bias=attention not in ("hard", "gated")).double()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    if attention == "hard":
        head.attention_weight.copy_(torch.tensor([0.5, -2.0, 1.5]))
    return head, [torch.randn(40, c, 2, 2, dtype=torch.float64) for c in (3, 5, 4)]


def explicit_term(head: InterflowHead, z: Tensor, b: int, i: int, k: int) -> float:
    """The term of branch i in y[b, k], from the definition, one number at a time."""
    w, n = head.attention_weight, z.shape[1]
    if head.attention in ("hard", "1xn"):
        return (w[i] * z[b, i, k]).item()
    if head.attention == "nxn":
        return sum((w[j, i] * z[b, i, k]).item() for j in range(n))
    if head.attention == "classwise":
        return (w[i, k] * z[b, i, k]).item()
    scores = [math.exp(sum((w[a, j] * z[b, j, k]).item() for j in range(n)) + head.attention_bias[a].item()) for a in range(n)]
    return scores[i] / sum(scores) * z[b, i, k].item()


@pytest.mark.parametrize("attention", ["hard", "1xn", "nxn", "classwise", "gated"])
def test_contribution_is_the_std_of_the_branchs_term_averaged_over_classes(attention):
    head, features = scored_head(attention)
    y, z = head.forward_branches(features)
    terms = torch.tensor([[[explicit_term(head, z, b, i, k) for k in range(6)] for i in range(3)] for b in range(40)], dtype=torch.float64)
    torch.testing.assert_close(branch_terms(head, z).detach(), terms)
    constant = 0 if attention in ("hard", "gated") else head.attention_bias.sum() if attention == "nxn" else head.attention_bias
    torch.testing.assert_close(terms.sum(1) + constant, y)
    gathered = Contribution()
    for part in branch_terms(head, z).split((7, 1, 32)):
        gathered.update(part)
    expected = torch.stack([torch.stack([terms[:, i, k].std() for k in range(6)]).mean() for i in range(3)])
    torch.testing.assert_close(gathered.compute(), expected)


def test_contribution_keeps_its_digits_far_from_zero():
    terms = torch.randn(64, 2, 3, dtype=torch.float64) + 1e6
    gathered = Contribution()
    for part in terms.split(16):
        gathered.update(part)
    torch.testing.assert_close(gathered.compute(), terms.std(0).mean(1), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="no batch was added yet"):
        Contribution().compute()


def test_logged_contribution_is_that_of_the_validation_images(tmp_path):
    seed_everything(0, verbose=False)
    model, digits_data = Classifier(**TINY, attention="gated"), data()
    run = trainer(tmp_path, limit_val_batches=1.0)
    run.fit(model, datamodule=digits_data)
    model.eval()
    with torch.no_grad():
        z = model.model.forward_branches(digits_data.parts[1].tensors[0])[1]
        gates = torch.softmax(torch.einsum("ij,bjk->bik", model.model.head.attention_weight, z) + model.model.head.attention_bias[:, None], 1)
    expected = (gates * z).std(0).mean(1)
    got = torch.stack([run.callback_metrics[f"contribution/branch{i}"] for i in range(1, 5)])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


# training


def test_one_cycle_rises_then_falls():
    factors = [one_cycle(step / 100, 0.25) for step in range(131)]
    assert factors[0] == pytest.approx(0.04) and factors[25] == 1 == max(factors) and factors[100] == pytest.approx(0.001)
    assert factors[:26] == sorted(factors[:26]) and factors[25:] == sorted(factors[25:], reverse=True)
    assert factors[130] == factors[100]


@pytest.mark.parametrize("head", HEADS)
def test_what_is_logged(tmp_path, head):
    model = Classifier(**TINY, head=head)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data())
    keys = {"train/loss", "train/accuracy", "train/images_per_second", "val/loss", "val/accuracy"}
    branches = {f"val/accuracy_branch{i}" for i in range(1, 5)} if head in ("fused", "eager", "auxiliary") else set()
    contributions = {f"contribution/branch{i}" for i in range(1, 5)} if head in ("fused", "eager") else set()
    assert set(run.callback_metrics) == keys | branches | contributions
    assert all(value.isfinite() for value in run.callback_metrics.values())
    tested = run.test(model, datamodule=data(), verbose=False)[0]
    assert set(tested) == {"test/loss", "test/accuracy"} | {key.replace("val", "test") for key in branches}


def test_accuracies_and_losses_are_those_of_the_whole_set(tmp_path):
    model, digits_data = Classifier(**TINY, label_smoothing=0.1), data(batch_size=100)
    got = trainer(tmp_path, limit_test_batches=1.0).test(model, datamodule=digits_data, verbose=False)[0]
    x, target = digits_data.parts[2].tensors
    with torch.no_grad():
        y, z = model.eval().model.forward_branches(x)
    assert got["test/accuracy"] == pytest.approx((y.argmax(1) == target).float().mean().item(), abs=1e-5)
    assert got["test/accuracy_branch2"] == pytest.approx((z[:, 1].argmax(1) == target).float().mean().item(), abs=1e-5)
    assert got["test/loss"] == pytest.approx(F.cross_entropy(y, target).item(), abs=1e-4)  # without smoothing


def test_the_heads_own_loss_is_used():
    model = Classifier(**TINY, head="auxiliary", auxiliary_weight=0.5, label_smoothing=0.3)
    z, target = torch.randn(8, 4, 10), torch.arange(8)
    each = [F.cross_entropy(z[:, i], target) for i in range(4)]
    torch.testing.assert_close(model._train_loss(z, target), each[3] + 0.5 * (each[0] + each[1] + each[2]))
    plain = Classifier(**TINY, label_smoothing=0.3)
    torch.testing.assert_close(plain._train_loss(z[:, 0], target), F.cross_entropy(z[:, 0], target, label_smoothing=0.3))


def test_a_wrapped_head_trains_and_logs_as_the_head_does(tmp_path):
    """Its branches and contributions are logged, its bias does not decay."""
    model = Classifier(**TINY, weight_decay=0.01)
    model.model.head = checkpoint_wrapper(model.model.head)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data())
    assert {f"{key}{i}" for key in ("val/accuracy_branch", "contribution/branch") for i in range(1, 5)} <= set(run.callback_metrics)
    decayed = {id(p) for p in run.optimizers[0].param_groups[0]["params"]}
    assert {name for name, p in model.model.head.named_parameters() if id(p) in decayed} == {"weight"}  # as checkpoint_wrapper names it
    auxiliary = Classifier(**TINY, head="auxiliary")
    z, target = torch.randn(8, 4, 10), torch.arange(8)
    want = auxiliary._train_loss(z, target)
    auxiliary.model.head = torch.nn.Sequential(auxiliary.model.head)
    assert torch.equal(auxiliary._train_loss(z, target), want)


@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_every_parameter_is_in_one_group_and_only_weights_decay(tmp_path, attention):
    model = Classifier(**TINY, attention=attention, attention_bias=True, weight_decay=0.01)
    run = trainer(tmp_path)
    run.fit(model, datamodule=data())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in run.optimizers[0].param_groups)
    assert (run.optimizers[0].param_groups[0]["weight_decay"], run.optimizers[0].param_groups[1]["weight_decay"]) == (0.01, 0.0)
    assert decayed | rest == set(names.values()) and not decayed & rest
    convolutions = {name for name, p in model.named_parameters() if p.dim() == 4}
    assert decayed == convolutions | {"model.head.weight"}


def test_classes_of_data_and_model_must_agree(tmp_path):
    with pytest.raises(UserError, match=r"the data set has 10 classes but the model 7: give --model.num_classes 10"):
        trainer(tmp_path).fit(Classifier(**TINY, num_classes=7), datamodule=data())


def test_training_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"give --trainer.max_epochs or --trainer.max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(Classifier(**TINY), datamodule=data())


def test_mixed_precision(tmp_path):
    run = trainer(tmp_path, precision="bf16-mixed")
    run.fit(Classifier(**TINY), datamodule=data())
    assert run.callback_metrics["train/loss"].isfinite()


# checkpoints and resuming


def test_a_checkpoint_rebuilds_the_model(tmp_path):
    given = {"head": "eager", "attention": "classwise", "stages": [6, 7], "attention_bias": True, "name": "vgg16"}
    model, run = Classifier(**TINY, **given), trainer(tmp_path)
    run.fit(model, datamodule=data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    for again in (checkpoints.load(tmp_path / "a.ckpt"), Classifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()):
        assert again.hparams["stages"] == [6, 7] and again.model.head.attention == "classwise"
        assert again.class_names == tuple("0123456789") and again.preprocessing == data().preprocessing
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(again(x), model.eval()(x))


def test_loading_a_checkpoint_of_a_pretrained_model_needs_no_torchvision(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["pretrained"] = True
    torch.save(content, tmp_path / "a.ckpt")
    assert checkpoints.load(tmp_path / "a.ckpt").pretrained


def test_resumed_run_goes_on_in_its_folder_and_keeps_its_log(tmp_path):
    options = {"save_last": True, "filename": "best", "monitor": "val/loss", "enable_version_counter": False}
    first = trainer(tmp_path, max_epochs=2, logger=runs.loggers(tmp_path), callbacks=[ModelCheckpoint(**options)])
    first.fit(Classifier(**TINY), datamodule=data())
    run = runs.newest(tmp_path)
    assert run == tmp_path / "version_0" == runs.folder(first)
    last = runs.checkpoint("last", tmp_path)
    assert last == run / "checkpoints" / "last.ckpt" and runs.checkpoint("best", tmp_path).name == "best.ckpt"
    # more epochs than at first: the schedule must not mind
    second = trainer(tmp_path, max_epochs=4, logger=runs.loggers(tmp_path, run), callbacks=[ModelCheckpoint(**options)])
    second.fit(Classifier(**TINY), datamodule=data(), ckpt_path=last)
    assert runs.folder(second) == run
    log = report.read_log(run)
    assert sorted(log["val/accuracy"]) == [0, 1, 2, 3]
    assert second.global_step == 12
    third = runs.loggers(tmp_path)
    assert {logger.version for logger in third} == {1}


def test_newest_run_is_by_number(tmp_path):
    for name in ("version_9", "version_10", "version_x", "other"):
        (tmp_path / name).mkdir()
    assert runs.newest(tmp_path) == tmp_path / "version_10"
    with pytest.raises(UserError, match=r"there is no last checkpoint yet: .*version_10/checkpoints/last.ckpt does not exist"):
        runs.checkpoint("last", tmp_path)
    with pytest.raises(UserError, match="there is no best checkpoint yet"):
        runs.checkpoint("best", tmp_path / "nowhere")


def test_a_folder_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        runs.require_writable(tmp_path / "file" / "runs")


def test_finish_tests_the_best_checkpoint_not_the_last_weights(tmp_path, capsys):
    callback = ModelCheckpoint(filename="best", monitor="val/loss")
    model, digits_data = Classifier(**TINY), data()
    run = trainer(tmp_path, logger=runs.loggers(tmp_path), callbacks=[callback])
    run.fit(model, datamodule=digits_data)
    with torch.no_grad():
        model.model.head.weight.fill_(float("nan"))
    metrics = runs.finish(run, model, digits_data)
    assert math.isfinite(metrics["test/loss"])
    printed = capsys.readouterr().out
    assert f"Test accuracy of {callback.best_model_path}" in printed and "branch 4 alone" in printed
    assert f"Curves: {tmp_path / 'version_0' / 'curves.png'}" in printed


# the report


def write_log(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for row in rows for key in row}))
        writer.writeheader()
        writer.writerows(rows)


def test_log_is_read_by_epoch_and_the_newest_value_counts(tmp_path):
    write_log(tmp_path / "metrics_0.csv", [{"epoch": 0, "step": 5, "val/loss": 1.0}, {"epoch": 1, "step": 9, "val/loss": 0.9}])
    write_log(tmp_path / "metrics.csv", [{"epoch": 1, "step": 9, "val/loss": 0.5}, {"epoch": 1, "step": 9, "train/loss": 2.0}])
    assert report.read_log(tmp_path) == {"val/loss": {0: 1.0, 1: 0.5}, "train/loss": {1: 2.0}}


@pytest.mark.parametrize("branches", [0, 12])
def test_picture(tmp_path, branches):
    keys = ["train/loss", "val/loss", "train/accuracy", "val/accuracy"]
    keys += [f"{prefix}{i}" for i in range(1, branches + 1) for prefix in ("val/accuracy_branch", "contribution/branch")]
    write_log(tmp_path / "metrics.csv", [{"epoch": e, "step": e} | {key: 1 / (i + e + 1) for i, key in enumerate(keys)} for e in range(5)])
    with Image.open(report.draw(tmp_path)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 800 and picture.height > (600 if branches else 300)
        colours = picture.convert("RGB").getcolors(1 << 24)
    total = picture.width * picture.height
    assert max(count for count, _ in colours) < 0.98 * total  # not blank
    assert {(31, 119, 180), (255, 127, 14)} <= {colour for _, colour in colours}  # both curves are there


def test_accuracy_table_orders_branches_by_number():
    metrics = {"test/accuracy": 0.5, "test/loss": 1.0} | {f"test/accuracy_branch{i}": i / 100 for i in (10, 2, 1)}
    assert [line.split() for line in report.accuracy_table(metrics).splitlines()] == [
        ["the", "model", "50.00%"],
        ["branch", "1", "alone", "1.00%"],
        ["branch", "2", "alone", "2.00%"],
        ["branch", "10", "alone", "10.00%"],
    ]
    assert report.accuracy_table({"test/accuracy": 1.0}).split() == ["the", "model", "100.00%"]


# the demo


def test_timing_takes_turns():
    calls = []
    timings = timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5)
    assert calls == ["a", "b"] * 8
    assert all(0 <= t.low <= t.median <= t.high for t in timings.values())


def test_parts_are_checked_before_they_are_timed(monkeypatch):
    monkeypatch.setattr(comparison, "SIDES", ((8, 6), (4, 3)))
    parts = comparison.time_parts("cpu")
    assert set(parts) == {"head, forward", "head, forward + backward", "ends of stages, forward", "ends of stages, forward + backward"}
    assert all(set(timings) == {"plain", "fused"} for timings in parts.values())
    with monkeypatch.context() as patch:
        right = FusedInterflowHead._run
        patch.setattr(FusedInterflowHead, "_run", lambda self, *given: (right(self, *given)[0] * 1.01, None))
        with pytest.raises(AssertionError, match="not close"):
            comparison.time_parts("cpu")
    tap = StageTap.forward
    monkeypatch.setattr(StageTap, "forward", lambda self, *given: [x * 1.01 for x in tap(self, *given)])
    with pytest.raises(AssertionError, match="not close"):
        comparison.time_parts("cpu")


def test_train_step_timing_leaves_the_given_model_as_it_is():
    model = Classifier(**TINY).model
    before = [type(module) for module in model.modules()]
    assert set(comparison.time_train_steps(model, "cpu")) == {"VGG-16 without Interflow", "with Interflow, plain PyTorch", "with Interflow, fused"}
    assert [type(module) for module in model.modules()] == before


def test_defaults_of_the_file_are_the_recipe(tmp_path):
    run, model, digits_data = digits.prepare(tmp_path, 3, enable_progress_bar=False)
    assert run.max_epochs == 16 and model.hparams["width"] == 0.25 and digits_data.preprocessing.size == 32
    assert model.model.head_name == "fused" and digits_data.seed == 0
    assert CHECKPOINT_KEY == "interflow_vision"


@pytest.mark.slow
def test_the_recipe_reaches_97_percent(tmp_path):
    assert demo.train(tmp_path, seed=0, lines=False)[2]["test/accuracy"] >= 0.97
