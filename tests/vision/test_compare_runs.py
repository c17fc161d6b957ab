"""Runs of a study: none twice, resumed with the bits of an unbroken one, results of every end; the command."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("scipy")

from lightning.pytorch import Callback

from interflow_vision import create_model
from interflow_vision.cli import compare
from interflow_vision.compare import datasets, measures, plan, results, run, workers
from interflow_vision.errors import UserError

HERE = Path(__file__).parent
SMALL = yaml.safe_load((HERE / "study/study.yaml").read_text())
TINY = {
    **SMALL,
    "rates": [0.02],
    "seeds": [0],
    "recipe": {"batch_size": 256},
    "data": {"digits": {"source": "digits", "size": 16, "epochs": 2}},
    "networks": {"net": {"name": "vgg16_bn", "width": 0.02}},
    "cells": [{"data": ["digits"], "networks": ["net"], "arms": ["nxn-norm-loss"]}],
    "claims": [],
}


def study(folder, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "study.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    return plan.read(folder / "study.yaml")


def only(made):
    (found,) = made.finals(dict.fromkeys(made.seeds, 0.02))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run, done: its folder and its result."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run.perform(only(study(folder)), folder / "results")


def test_what_a_result_holds(whole):
    folder, result = whole
    path = folder / "results/final/digits/net/nxn-norm-loss/seed0.json"
    assert json.loads(path.read_text()) == result
    assert result["status"] == "done" and result["rate"] == 0.02 and result["final"]
    assert len(result["epochs"]) == 2 and len(result["gradients"]["names"]) == 13
    assert [len(norms) for norms in (result["gradients"]["start"], *result["gradients"]["epochs"])] == [13] * 3
    assert all(norm > 0 for norm in result["gradients"]["start"])
    assert {"accuracy", "loss", *(f"accuracy_branch{i}" for i in range(1, 5))} == set(result["test"])
    assert set(result["contribution"]) == {f"branch{i}" for i in range(1, 5)}
    assert 0 <= result["training"]["accuracy"] <= 1
    assert result["parameters"] == sum(p.numel() for p in create_model("vgg16_bn", width=0.02, norm="batch").parameters())
    assert not list((folder / "results" / results.UNFINISHED).rglob("*.ckpt"))


def test_a_tuning_run_does_not_see_the_test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.Digits, "test_dataloader", lambda self: pytest.fail("the test images were read"))
    made = study(tmp_path, rates=[0.02, 0.05])
    result = run.perform(next(made.tuning()), tmp_path)
    assert result["status"] == "done" and "test" not in result and "accuracy" in result["validation"]


class Stop(Callback):
    """Ends a run as a kill would, in the second epoch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, 2):
            raise MemoryError("stopped")


def test_an_interrupted_run_goes_on_with_the_bits_of_an_unbroken_one(whole, tmp_path, monkeypatch):
    wanted = only(study(tmp_path))
    made = run._trainer
    with monkeypatch.context() as patch:

        def stopping(*arguments):
            trainer = made(*arguments)
            trainer.callbacks.insert(0, Stop())
            return trainer

        patch.setattr(run, "_trainer", stopping)
        with pytest.raises(MemoryError):
            run.perform(wanted, tmp_path / "results")
    assert results.missing([wanted], tmp_path / "results") == [wanted]
    assert list((tmp_path / "results" / results.UNFINISHED).rglob("last.ckpt"))
    result = run.perform(wanted, tmp_path / "results")
    for key in ("test", "validation", "contribution", "training", "gradients"):
        assert result[key] == whole[1][key], key
    for got, want in zip(result["epochs"], whole[1]["epochs"], strict=True):
        assert {k: v for k, v in got.items() if "second" not in k} == {k: v for k, v in want.items() if "second" not in k}


def test_a_run_that_diverges_is_a_result(tmp_path):
    made = study(tmp_path, rates=[1e9], arms={**TINY["arms"]}, networks={"net": {"name": "plain16", "width": 0.02}})
    (wanted,) = made.finals(dict.fromkeys(made.seeds, 1e9))
    result = run.perform(wanted, tmp_path)
    assert result["status"] == "diverged" and "--model.lr" in result["why"] and "test" not in result
    assert results.accuracies({0: result}) == {}


def test_none_is_run_twice_and_other_options_are_refused(whole, tmp_path):
    folder, _ = whole
    wanted = only(study(tmp_path))
    assert results.missing([wanted], folder / "results") == []
    other = only(study(tmp_path, recipe={"batch_size": 128}))
    with pytest.raises(UserError, match=r"seed0.json was made with other options than the study has now"):
        results.missing([other], folder / "results")
    broken = tmp_path / "results" / wanted.path
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    with pytest.raises(UserError, match=r"seed0.json is no result of a run"):
        results.missing([wanted], tmp_path / "results")


def test_one_study_at_a_time_in_a_folder(tmp_path):
    with workers.alone(tmp_path), pytest.raises(UserError, match="another process trains into"), workers.alone(tmp_path):
        pass
    with workers.alone(tmp_path):
        pass


def test_rates_are_chosen_on_validation(tmp_path):
    made = study(tmp_path, rates=[0.1, 0.02, 0.5], tuning_seeds=[7, 8])
    (cell,) = made.seeds
    accuracy = {0.02: (0.5, 0.7), 0.1: (0.9, 0.3), 0.5: (0.99, None)}
    for each in made.tuning():
        value = accuracy[each.rate][each.seed - 7]
        status = {"status": "diverged"} if value is None else {"status": "done", "validation": {"accuracy": value}}
        results.write(tmp_path / each.path, {"digest": results.digest(each), "cell": {}, "seed": each.seed, "rate": each.rate, **status})
    assert results.chosen_rates(made, tmp_path) == {cell: 0.02}  # of equals the smallest; none with which a run diverged
    (tmp_path / next(made.tuning()).path).unlink()
    with pytest.raises(UserError, match="train the study first"):
        results.chosen_rates(made, tmp_path)


# --- data and starts --------------------------------------------------------------------------------------------------------
def test_fashion_mnist(tmp_path):
    if not datasets.FASHION_MNIST.is_dir():
        pytest.skip(f"there is no {datasets.FASHION_MNIST}: Debian's package dataset-fashion-mnist brings it")
    images, labels, test, test_labels = datasets.fashion_mnist(datasets.FASHION_MNIST)
    assert images.shape == (60_000, 28, 28) and test.shape == (10_000, 28, 28)
    assert labels.bincount().tolist() == [6000] * 10 and test_labels.bincount().tolist() == [1000] * 10
    data = datasets.create({"source": "fashion-mnist", "train": 200, "validation": 100, "epochs": 1}, 64)
    data.setup()
    x, y = data.parts[0].tensors
    assert x.shape == (200, 1, 32, 32) and len(data.parts[1]) == 100 and len(data.parts[2]) == 10_000
    assert abs(float(x.mean())) < 0.1
    again = datasets.create({"source": "fashion-mnist", "train": 200, "validation": 100}, 32)
    again.setup()
    assert torch.equal(again.parts[0].tensors[1], y)


def test_data_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="source must be one of digits, fashion-mnist, got 'cats'"):
        datasets.create({"source": "cats"}, 4)
    with pytest.raises(UserError, match="the data set 'digits' does not take what the study gives it: .*colour"):
        datasets.create({"source": "digits", "colour": 1}, 4)
    with pytest.raises(UserError, match="there is no file train-images-idx3-ubyte"):
        datasets.fashion_mnist(tmp_path)
    import gzip

    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes((0, 0, 8, 3, 0, 0, 0, 2)) + bytes(20)))
    with pytest.raises(UserError, match="is damaged: for 2 x 0 x 0 values it must have 16 bytes"):
        datasets.fashion_mnist(tmp_path)


def test_a_start_that_equalises_the_branches():
    torch.manual_seed(0)
    net, x = create_model("vgg16_bn", width=1 / 32, attention="gated"), torch.randn(64, 3, 32, 32)
    before = net.features.state_dict()["0.weight"].clone()
    measures.equalise(net, x)
    _, z = net.train().forward_branches(x)
    spread = z.std(0).mean(1)
    torch.testing.assert_close(spread, spread[-1].expand(4), rtol=1e-3, atol=0)
    assert z.mean(0).abs().max() < 1e-4 * float(spread[-1]) + 1e-5
    assert torch.equal(net.features.state_dict()["0.weight"], before)
    with pytest.raises(ValueError, match="start: equal is for Interflow heads, got ConcatHead"):
        measures.equalise(create_model("vgg16_bn", width=1 / 32, head="concat"), x)


# --- the command ------------------------------------------------------------------------------------------------------------
def test_again_and_plan(whole, tmp_path, capsys):
    _, result = whole
    made = study(tmp_path, seeds=[0, 1])
    for each, accuracy in zip(made.finals(dict.fromkeys(made.seeds, 0.02)), (0.3, 0.4), strict=True):
        kept = {**result, "digest": results.digest(each), "seed": each.seed, "test": {**result["test"], "accuracy": accuracy}}
        results.write(tmp_path / "results" / each.path, kept)
    assert compare.main([str(tmp_path / "study.yaml"), "--plan"]) == 0
    assert "runs that count: 2 of 2 done" in capsys.readouterr().out
    with pytest.raises(UserError, match="--again must be one of the study's cells, such as digits/net/nxn-norm-loss, got 'nxn'"):
        compare.main([str(tmp_path / "study.yaml"), "--again", "nxn"])
    for option in ("--jobs", "--runs"):
        with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
            compare.main([str(tmp_path / "study.yaml"), option, "0"])


@pytest.mark.slow
def test_the_command_trains_a_study_and_trains_it_once(interflow, tmp_path):
    shutil.copy(HERE / "study/study.yaml", tmp_path)
    given = yaml.safe_load((tmp_path / "study.yaml").read_text())
    given["data"]["digits"]["epochs"] = 1
    given["cells"] = [{"data": ["digits"], "networks": ["vgg16_bn"], "arms": ["nxn", "nxn-norm-loss"]}]
    given["claims"], given["rates"] = given["claims"][:1], [0.02]
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(given))
    first = interflow("compare", "study.yaml", "--jobs", "2", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("4/4") == 1
    assert {"report.md", "report.html", "results", "study.yaml"} <= {path.name for path in tmp_path.iterdir()}
    second = interflow("compare", "study.yaml", cwd=tmp_path)
    assert second.returncode == 0 and "accuracy" not in second.stdout
    again = interflow("compare", "study.yaml", "--again", "digits/vgg16_bn/nxn", cwd=tmp_path)
    assert again.returncode in (0, 1) and "where 95 % of new runs lie" in again.stdout
    bad = interflow("compare", "none.yaml", cwd=tmp_path)
    assert bad.returncode == 2 and bad.stderr.startswith("interflow: the study none.yaml cannot be read")
