"""Models and trainer with norm="batch" and branch_loss: which heads take them, serving, training, checkpoints; plain networks of any depth."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import nn

from interflow_kernels import FoldedInterflowHead, FusedInterflowHead
from interflow_vision import create_model
from interflow_vision.data.modules import Digits
from interflow_vision.training.classifier import Classifier

SMALL = 1 / 32
TINY = {"width": SMALL, "lr": 0.02}


def images(batch=4, side=32):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))


def trainer(folder, **options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=2, limit_test_batches=2, default_root_dir=folder, **quiet, **options)


@pytest.mark.parametrize("stage", ["fused", "eager"])
@pytest.mark.parametrize("head", ["fused", "eager", "concat", "last"])
def test_every_head_that_takes_a_norm_trains(head, stage):
    torch.manual_seed(0)
    model = create_model("vgg16", head=head, stage=stage, norm="batch", width=SMALL).train()
    F.cross_entropy(model(images()), torch.arange(4)).backward()
    assert model.head.norm.weight.grad is not None and int(model.head.norm.num_batches_tracked) == 1
    assert model.rebuilt().head.norm is not None
    model.reset_classifier(7)
    assert model.head.norm is not None


def test_stages_and_heads_give_the_same():
    torch.manual_seed(0)
    fused = create_model("vgg16", norm="batch", width=SMALL).train()
    for options in ({"stage": "eager"}, {"head": "eager"}, {"stage": "eager", "head": "eager"}):
        other = fused.rebuilt(**options).train()
        other.load_state_dict(fused.state_dict())
        torch.testing.assert_close(other(images()), create_from(fused)(images()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other.head.norm.running_var, used(fused).head.norm.running_var, rtol=1e-4, atol=1e-6)


def create_from(model):
    """A copy in training mode."""
    other = model.rebuilt().train()
    other.load_state_dict(model.state_dict())
    return other


def used(model):
    other = create_from(model)
    other(images())
    return other


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"head": "auxiliary", "norm": "batch"}, "norm must be None for head='auxiliary', got 'batch'"),
        ({"head": "auxiliary", "branch_loss": 0.3}, "branch_loss must be 0 for head='auxiliary', got 0.3"),
        ({"head": "concat", "branch_loss": 0.3}, "branch_loss must be 0 for head='concat', got 0.3"),
        ({"head": "concat", "norm": "layer"}, "norm must be None or 'batch', got 'layer'"),
        ({"norm": "layer"}, "norm must be None or 'batch', got 'layer'"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        create_model("vgg16", width=SMALL, **options)


# --- serving --------------------------------------------------------------------------------------------------------------
def trained(**options):
    """A network whose norms are not those it starts with."""
    torch.manual_seed(0)
    net = create_model("vgg16_bn", width=SMALL, **options).train()
    for _ in range(3):
        net(images(16) * 2 + 1)
    return net.eval()


@pytest.mark.parametrize(("attention", "kind"), [("nxn", FoldedInterflowHead), ("classwise", FoldedInterflowHead), ("gated", FusedInterflowHead)])
def test_for_inference_folds_the_heads_norm(attention, kind):
    net = trained(norm="batch", attention=attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = net.for_inference()
    assert type(ready.head) is kind
    assert not any(isinstance(module, nn.modules.batchnorm._NormBase) for module in ready.modules())
    torch.testing.assert_close(ready(images()), net(images()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(net.fuse()(images()), net(images()), rtol=1e-3, atol=1e-4)
    low = net.for_inference(torch.bfloat16)
    torch.testing.assert_close(low(images().bfloat16()).float(), net(images()), rtol=0.1, atol=0.1)


def test_a_norm_that_stays_is_named():
    net = trained(norm="batch")
    net.head.norm = nn.BatchNorm1d(net.head.norm.num_features, track_running_stats=False).eval()
    with pytest.warns(
        UserWarning, match=r"^for_inference leaves as it is what it cannot fold: head.norm \(BatchNorm1d, no batch norm with running statistics\)$"
    ):
        ready = net.for_inference()
    torch.testing.assert_close(ready(images()), net(images()), rtol=1e-3, atol=1e-4)
    other = trained(head="concat", norm="batch")
    with pytest.warns(UserWarning, match=r"head.norm \(BatchNorm1d\)$"):
        other.for_inference()


# --- training -------------------------------------------------------------------------------------------------------------
def test_loss_and_logs_of_a_training_with_both(tmp_path):
    model = Classifier(**TINY, norm="batch", branch_loss=0.3, label_smoothing=0.1)
    run = trainer(tmp_path)
    run.fit(model, datamodule=Digits(size=32))
    logged = {f"{key}{i}" for key in ("val/accuracy_branch", "contribution/branch") for i in range(1, 5)}
    assert logged | {"train/loss", "train/accuracy"} <= set(run.callback_metrics)
    assert int(model.model.head.norm.num_batches_tracked) == 2
    x, target = images(), torch.arange(4)
    model.train()
    output = model._train_output(x)
    y, z = output
    each = sum(F.cross_entropy(z[:, i], target, label_smoothing=0.1) for i in range(4))
    torch.testing.assert_close(model._train_loss(output, target), F.cross_entropy(y, target, label_smoothing=0.1) + 0.3 * each)
    assert isinstance(Classifier(**TINY, norm="batch")._train_output(x), torch.Tensor)


def test_norms_have_no_weight_decay(tmp_path):
    model = Classifier(**TINY, norm="batch", weight_decay=0.01)
    run = trainer(tmp_path)
    run.fit(model, datamodule=Digits(size=32))
    decayed = {id(p) for p in run.optimizers[0].param_groups[0]["params"]}
    assert id(model.model.head.weight) in decayed
    assert not decayed & {id(p) for p in model.model.head.norm.parameters()}


def test_checkpoints_keep_norm_and_branch_loss(tmp_path):
    model = Classifier(**TINY, norm="batch", branch_loss=0.3)
    run = trainer(tmp_path)
    run.fit(model, datamodule=Digits(size=32))
    run.save_checkpoint(tmp_path / "kept.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "kept.ckpt")
    assert again.model.head.branch_loss == 0.3
    assert torch.equal(again.model.head.norm.running_mean, model.model.head.norm.running_mean)
    with pytest.raises(ValueError, match="^branch_loss must be a finite number, at least 0, got -1"):
        Classifier(**TINY, branch_loss=-1)


@pytest.mark.slow
def test_the_command_takes_both_in_two_processes(interflow, lightning_cli, tmp_path):
    options = "--data.size 16 --data.batch_size 16 --trainer.max_epochs 1 --trainer.limit_train_batches 2 --trainer.limit_val_batches 1"
    more = "--trainer.limit_test_batches 1 --model.width 0.02 --model.norm batch --model.branch_loss 0.3 --trainer.accelerator cpu --trainer.devices 2"
    done = interflow("fit", *options.split(), *more.split(), "--trainer.strategy", "ddp", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Test accuracy" in done.stdout


# --- plain networks of any depth ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "blocks"), [(5, (1, 1, 1, 1, 1)), (13, (2, 2, 3, 3, 3)), (32, (5, 5, 8, 7, 7)), (39, (6, 6, 9, 9, 9)), (50, (8, 8, 12, 11, 11))]
)
def test_plain_networks(count, blocks):
    net = create_model(f"plain{count}", width=SMALL)
    convolutions = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == count == sum(blocks) and not net.batch_norm
    assert [info["num_chs"] for info in net.feature_info] == [4, 8, 16, 16]
    taps = [name for name, place in net.features.places.items() if place.feature]
    assert len(taps) == 4
    assert net(images(2)).shape == (2, 10)
    plain = create_model(f"plain{count}", width=SMALL, head="last")
    assert plain(images(2)).shape == (2, 10) and len(plain.feature_info) == 1


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("plain4", "a plain network must have at least 5 convolutions"), ("plain0", "name must be one of"), ("plainx", "name must be one of")],
)
def test_plain_networks_that_are_none(name, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        create_model(name)
    with pytest.raises(ValueError, match="^pretrained must be False for plain32"):
        create_model("plain32", pretrained=True)
