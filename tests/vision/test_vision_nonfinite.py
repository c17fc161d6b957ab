"""Losses and weights that are not finite: a training stops at once or leaves the batch out, and such a checkpoint is refused."""

import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision

from interflow_vision.data.modules import Digits
from interflow_vision.errors import UserError
from interflow_vision.training import checkpoints
from interflow_vision.training.classifier import Classifier


class Spoil(Callback):
    """Spoils the images of some batches, or a weight before one."""

    def __init__(self, batches=(), weight=None, validation=None) -> None:
        self.batches, self.weight, self.validation = batches, weight, validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch_idx in self.batches:
            if self.weight is None:
                batch[0][3, 0, 5, 5] = math.inf
            else:
                with torch.no_grad():
                    pl_module.get_parameter(self.weight).view(-1)[4] = math.nan  # the middle of a 3x3 kernel

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0) -> None:
        if batch_idx == self.validation and not trainer.sanity_checking:
            batch[0][0] = math.nan


def fit(folder, spoil, precision="32-true", plugins=None, train_batches=6, **options):
    callbacks = [spoil, ModelCheckpoint(dirpath=folder, save_last=True, monitor="val/loss")]
    trainer = Trainer(
        max_epochs=1, limit_train_batches=train_batches, limit_val_batches=2, accelerator="cpu", logger=False, callbacks=callbacks, plugins=plugins,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **({} if plugins else {"precision": precision}),
    )  # fmt: skip
    model = Classifier(**{"width": 0.02, "lr": 0.01, **options})
    trainer.fit(model, datamodule=Digits(size=16, batch_size=16))
    return trainer, model


@pytest.mark.parametrize(
    ("spoil", "head", "message"),
    [
        (Spoil([4]), "fused", r"the training loss is nan at step 4 \(epoch 0, batch 4\): branch 1 of 4 is the first .* the images are not finite; lower"),
        (Spoil([2], "model.features.0.weight"), "fused", r"nan at step 2 \(epoch 0, batch 2\): branch 1 of 4 .* the weight features.0.weight is not finite"),
        (Spoil([1]), "last", r"nan at step 1 \(epoch 0, batch 1\): the images are not finite; lower --model.lr, or leave such batches out with"),
    ],
)
def test_training_stops_at_the_first_loss_that_is_not_finite(spoil, head, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        fit(tmp_path, spoil, head=head, pool5=False)
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())  # no checkpoint of it


def test_a_later_branch_is_named(tmp_path):
    model = Classifier(width=0.02)
    last = [name for name, parameter in model.named_parameters() if name.startswith("model.features") and parameter.dim() == 4][-1]
    with pytest.raises(UserError, match="branch 4 of 4 is the first"):
        fit(tmp_path, Spoil([2], last))


def test_a_validation_loss_that_is_not_finite_ends_the_run_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"the validation loss after step 6 \(epoch 0\) is not finite in batch 1, branch 1 of 4 is the first"):
        fit(tmp_path, Spoil(validation=1))
    assert not list(tmp_path.iterdir())


def test_left_out_batches_change_nothing_and_are_counted(tmp_path):
    trainer, model = fit(tmp_path, Spoil([1, 2, 4]), skip_nonfinite=2)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert trainer.callback_metrics["train/skipped_batches"] == 3 and trainer.callback_metrics["train/loss"].isfinite()
    for batches, limit in (([1, 2, 3], 2), ([5, 0], 1)):
        if limit == 2:
            with pytest.raises(UserError, match=r"after 2 batches in a row were left out, the training loss is nan at step 3 \(epoch 0, batch 3\)"):
                fit(tmp_path, Spoil(batches), skip_nonfinite=limit)
        else:
            fit(tmp_path, Spoil(batches), skip_nonfinite=limit)


def test_a_left_out_batch_leaves_weights_momentum_and_statistics(tmp_path):
    class Watch(Spoil):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.before = self.everything(trainer, pl_module)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            same = [torch.equal(a, b) for a, b in zip(self.before, self.everything(trainer, pl_module), strict=False)]
            assert all(same) if batch_idx in self.batches else not all(same)

        @staticmethod
        def everything(trainer, pl_module) -> list[torch.Tensor]:
            momenta = [state["momentum_buffer"] for state in trainer.optimizers[0].state_dict()["state"].values()]
            return [value.clone() for value in [*pl_module.state_dict().values(), *momenta]]

    fit(tmp_path, Watch([2, 4]), skip_nonfinite=1)


def test_overflows_of_the_gradient_scaler_are_no_errors(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=10**6)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    _, model = fit(tmp_path, Spoil(), plugins=[plugin], train_batches=3, stage="eager", head="eager")
    assert scaler.get_scale() < 2.0**126  # it did overflow
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", ["model.head.weight", "model.features.1.running_var"])
def test_a_checkpoint_whose_weights_are_not_finite_is_neither_written_nor_read(name, checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"][name].view(-1)[1] = math.nan
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=rf"a.ckpt cannot be used: its {name} is not finite"):
        checkpoints.load(tmp_path / "a.ckpt")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    trainer, model = fit(tmp_path, Spoil(), train_batches=1)
    with torch.no_grad():
        model.model.head.weight.view(-1)[0] = math.inf
    with pytest.raises(UserError, match=r"model.head.weight is not finite after step 1: no checkpoint of it is written"):
        trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "a.ckpt").exists()


def test_limit_of_left_out_batches():
    with pytest.raises(ValueError, match="skip_nonfinite must be at least 0, got -1"):
        Classifier(width=0.02, skip_nonfinite=-1)
