"""The training of an image classifier as a LightningModule: loss, optimiser, schedule, and what is logged."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor

from interflow_kernels import InterflowHead

from ..backbones import InterflowNetwork
from ..data.images import Preprocessing
from ..models.registry import create_model
from ..models.vgg import VGG
from ..models.wrappers import unwrapped
from ..processes import EveryProcessError
from ..reports.contribution import Contribution, branch_terms
from . import checks, optimization
from .building import create_backbone
from .execution import Execution
from .finetuning import take_trunk
from .finite import EvaluationGuard, LossGuard, require_finite_weights

CHECKPOINT_KEY = "interflow_vision"
"""Where a checkpoint keeps the preprocessing and the names of the classes."""


class Classifier(LightningModule):
    """Trains a model of create_model, unless told otherwise with SGD (Nesterov) and one cycle of the learning rate.

    Logged each epoch: train/loss, train/accuracy, train/images_per_second; val/loss and val/accuracy, with more than ten
    classes val/top5 (the class is among the five highest scores); for heads with branches val/accuracy_branch1, ... and,
    for Interflow heads, contribution/branch1, ..., over the validation images (see contribution.py; several processes:
    the mean of theirs). A test logs the same as test/loss, ... Accuracies are fractions; losses are cross entropies in
    nats, val and test without label smoothing. Where batches may be left out (skip_nonfinite), train/skipped_batches says
    how many were. A loss that is not finite ends every run (finite.py).

    Args:
        name: the model, "vgg16", "vgg16_bn", or "plainN" for N convolutions without norms.
        num_classes: K.
        head: "fused" and "eager" are the Interflow head; "auxiliary", "concat" and "last" (plain VGG) are for comparison.
        stage: "fused" or "eager": what ends blocks and stages, see stages.py.
        attention: of the Interflow head.
        width: multiplier of all channel counts.
        stages: number of convolutions in each stage; default 4, 3, 3, 3.
        in_channels: channels of the images.
        pool5: whether head="last" keeps VGG's last max-pool.
        pool_size: side of the maps that features are averaged to.
        attention_bias: whether the attention has a bias.
        hard_weights: the branches' weights for attention="hard".
        auxiliary_weight: of each auxiliary loss, for head="auxiliary".
        norm: "batch" normalises what the branches see, see InterflowHead; for head="concat" and "last" too.
        branch_loss: weight of each branch's own loss beside the Interflow head's.
        pretrained: whether training starts from torchvision's ImageNet convolutions, for a backbone from its library's weights.
        backbone: another network in VGG's place: a name of timm, or "torchvision/" and a name of torchvision. Then `name`, `width` and
            `pool5` do not count, and `stages` are indices among its maps; default: the last four.
        backbone_options: of timm.create_model or torchvision.models.get_model, such as {"img_size": 32} for a ViT.
        lr: highest learning rate.
        momentum: of SGD.
        weight_decay: of the convolutions' and fully connected weights; biases, norms and the attention have none.
        label_smoothing: of the training loss (not used by head="auxiliary", which brings its own loss).
        warmup: part of the training in which the learning rate rises.
        skip_nonfinite: how many batches in a row may be left out because their loss is not finite; 0 stops at the first.
        optimizer: "sgd" (Nesterov), "adamw", or a name of timm's, such as "lamb".
        schedule: of the learning rate after the warm-up; "step" divides it by ten.
        step_at: parts of the training after which "step" does; default 0.5 and 0.75.
        trunk_lr: the trunk's learning rate over the head's; 0 freezes the trunk, its norms too.
        trunk_from: checkpoint of another run, whose trunk training starts from; the classes may differ.
        channels_last: whether maps are stored pixel by pixel, which most GPUs and CPUs convolve faster.
        compile: whether training runs through torch.compile.
        checkpointing: whether backward runs each block again in place of keeping its maps: less memory, more time, the same numbers.
    """

    def __init__(
        self,
        name: str = "vgg16_bn",
        num_classes: int = 10,
        head: Literal["fused", "eager", "auxiliary", "concat", "last"] = "fused",
        stage: Literal["fused", "eager"] = "fused",
        attention: Literal["hard", "1xn", "nxn", "classwise", "gated"] = "nxn",
        width: float = 1.0,
        stages: list[int] | None = None,
        in_channels: int = 3,
        pool5: bool = True,
        pool_size: int = 1,
        attention_bias: bool = False,
        hard_weights: list[float] | None = None,
        auxiliary_weight: float = 0.3,
        norm: Literal["batch"] | None = None,
        branch_loss: float = 0.0,
        pretrained: bool = False,
        backbone: str | None = None,
        backbone_options: dict[str, Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        label_smoothing: float = 0.0,
        warmup: float = 0.25,
        skip_nonfinite: int = 0,
        optimizer: str = "sgd",
        schedule: Literal["one_cycle", "cosine", "step", "constant"] = "one_cycle",
        step_at: list[float] | None = None,
        trunk_lr: float = 1.0,
        trunk_from: str | None = None,
        channels_last: bool = False,
        compile: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        checks.require_in_range(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            label_smoothing=label_smoothing,
            auxiliary_weight=auxiliary_weight,
            branch_loss=branch_loss,
            width=width,
            warmup=warmup,
        )
        self.save_hyperparameters()
        create: Callable[..., VGG | InterflowNetwork] = create_model if backbone is None else partial(create_backbone, backbone, backbone_options)
        self.model = create(
            name,
            attention,
            num_classes,
            head,
            stage=stage,
            width=width,
            stages=stages,
            in_channels=in_channels,
            pool5=pool5,
            pool_size=pool_size,
            attention_bias=attention_bias,
            hard_weights=hard_weights,
            auxiliary_weight=auxiliary_weight,
            norm=norm,
            branch_loss=branch_loss,
        )
        self.pretrained = pretrained
        self.lr = lr  # may be changed until training begins: Lightning's learning-rate finder does
        self.label_smoothing = label_smoothing
        step_at = [0.5, 0.75] if step_at is None else step_at
        self._settings = optimization.Settings(lr, momentum, weight_decay, warmup, optimizer, schedule, tuple(step_at), trunk_lr)
        self._how = Execution(channels_last, compile, checkpointing)
        self.trunk_from = trunk_from
        self.preprocessing: Preprocessing | None = None
        self.class_names: tuple[str, ...] = ()
        self._guard = LossGuard(skip_nonfinite)
        self._evaluation_guard = EvaluationGuard()
        self._schedule: torch.optim.lr_scheduler.LambdaLR | None = None
        self._contribution = Contribution()
        self._started = 0.0  # seconds, time.perf_counter
        self._images = 0

    def forward(self, x: Tensor) -> Tensor:
        """Images -> logits [B, K]."""
        return self.model(x)

    def setup(self, stage: str) -> None:
        """Takes over what the data set knows; EveryProcessError where it does not fit the model."""
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            preprocessing, names = checks.knowledge_of(data, self.model)
            self.preprocessing = preprocessing or self.preprocessing
            self.class_names = names or self.class_names
        if stage == "fit":
            if self.trainer.ckpt_path is None:
                self._start_weights()
            self._how.prepare(self.model)
            if self._settings.trunk_lr == 0:
                optimization.freeze_trunk(self.model)

    def _start_weights(self) -> None:
        if self.pretrained:
            self.model.load_pretrained()
        if self.trunk_from is not None:
            take_trunk(self.model, Path(self.trunk_from))

    def _train_output(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What the loss takes: logits [B, K]; of an auxiliary head Z [B, n, K]; of a head with a branch_loss logits and Z."""
        head = unwrapped(self.model.head)
        return self.model.forward_branches(x) if isinstance(head, InterflowHead) and head.branch_loss > 0 else self.model(x)

    def _train_loss(self, output: Tensor | tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        head = unwrapped(self.model.head)
        if isinstance(output, tuple):
            assert isinstance(head, InterflowHead)
            return head.loss(output, target, self.label_smoothing)
        loss = None if isinstance(head, InterflowHead) else getattr(head, "loss", None)
        return F.cross_entropy(output, target, label_smoothing=self.label_smoothing) if loss is None else loss(output, target)

    def on_train_epoch_start(self) -> None:
        self._started, self._images, self._guard.left_out = time.perf_counter(), 0, 0
        if self._settings.trunk_lr == 0:
            for module in optimization.trunk_modules(self.model):
                module.eval()  # running statistics stay those of the pretraining

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        x, target = batch
        self._guard.before_step(self)
        output = self._train_output(x)
        loss = self._train_loss(output, target)
        leaves_out = self._guard.leaves_out(self, x, loss, batch_idx)
        if self._guard.limit:
            left_out = float(self._guard.left_out)
            self.log("train/skipped_batches", left_out, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1, sync_dist=True)
        if leaves_out:
            return None  # on all processes: neither backward nor step
        logits = output[0] if isinstance(output, tuple) else output if output.dim() == 2 else output[:, -1]
        options: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(target), "sync_dist": True}
        self.log("train/loss", loss, **options)
        self.log("train/accuracy", _accuracy(logits, target), prog_bar=True, **options)
        return loss

    def on_after_backward(self) -> None:
        self._guard.after_backward(self)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._images += len(batch[1])
        if self.trainer.is_last_batch:  # before validation, which belongs to the epoch
            rate = self._images * self.trainer.world_size / (time.perf_counter() - self._started)
            self.log("train/images_per_second", rate, on_step=False, on_epoch=True, batch_size=1, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self._contribution, self._evaluation_guard = Contribution(), EvaluationGuard()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        branches = self._evaluate(batch, batch_idx, "val")
        head = unwrapped(self.model.head)
        if branches is not None and isinstance(head, InterflowHead):
            self._contribution.update(branch_terms(head, branches.to(head.weight.dtype)))

    def on_validation_epoch_end(self) -> None:
        self._evaluation_guard.require_finite(self, "validation")
        if isinstance(unwrapped(self.model.head), InterflowHead):
            for i, value in enumerate(self._contribution.compute(), 1):
                self.log(f"contribution/branch{i}", value.float(), sync_dist=True)

    def on_validation_end(self) -> None:
        """After the sanity check all metrics of a validation are known."""
        if self.trainer.sanity_checking:
            checks.require_monitored_metrics(self.trainer, self)

    def on_test_epoch_start(self) -> None:
        self._evaluation_guard = EvaluationGuard()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def on_test_epoch_end(self) -> None:
        self._evaluation_guard.require_finite(self, "test")

    def _evaluate(self, batch: tuple[Tensor, Tensor], batch_idx: int, part: str) -> Tensor | None:
        """Logs loss and accuracies of a batch; returns Z [B, n, K] where the head has branches."""
        x, target = batch
        logits, branches = self.model.forward_branches(x) if self.model.has_branches else (self.model(x), None)
        kept: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(target), "sync_dist": True}
        loss = F.cross_entropy(logits.float(), target)
        self._evaluation_guard.update(batch_idx, loss, branches)
        self.log(f"{part}/loss", loss, **kept)
        self.log(f"{part}/accuracy", _accuracy(logits, target), prog_bar=True, **kept)
        if logits.shape[1] > 10:
            self.log(f"{part}/top5", (logits.topk(5).indices == target[:, None]).any(1).float().mean(), **kept)
        for i, scores in enumerate([] if branches is None else branches.unbind(1), 1):
            self.log(f"{part}/accuracy_branch{i}", _accuracy(scores, target), **kept)
        return branches

    def configure_optimizers(self) -> Any:
        """The optimiser, and the learning rate's factor with a step each batch."""
        batches = self.trainer.estimated_stepping_batches
        if not math.isfinite(batches):
            raise EveryProcessError("one cycle of the learning rate needs an end: give --trainer.max_epochs or --trainer.max_steps")
        self._schedule = optimization.scheduled(self, replace(self._settings, lr=self.lr), max(1, int(batches)))
        return {"optimizer": self._schedule.optimizer, "lr_scheduler": {"scheduler": self._schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """A resumed run has the optimiser's settings of the checkpoint: this run's own (--model.lr ...) take their place."""
        if self._schedule is not None:
            optimization.apply(replace(self._settings, lr=self.lr), self._schedule)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a prediction needs beside the weights; EveryProcessError where a weight is not finite."""
        require_finite_weights(self)
        checkpoint[CHECKPOINT_KEY] = {
            "preprocessing": None if self.preprocessing is None else self.preprocessing.as_dict(),
            "class_names": list(self.class_names),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes it back; EveryProcessError where it is broken, or the data set of this run contradicts it."""
        preprocessing, names = checks.kept_knowledge(checkpoint.get(CHECKPOINT_KEY, {}), self.model)
        if self._trainer is not None:  # setup has asked the data set
            checks.require_same_knowledge((self.preprocessing, self.class_names), (preprocessing, names))
        self.preprocessing = preprocessing or self.preprocessing
        self.class_names = names or self.class_names


def _accuracy(scores: Tensor, target: Tensor) -> Tensor:
    """Fraction of [B, K] whose largest score is the target's [B], or the most probable class's of targets [B, K] (mixed images)."""
    return (scores.argmax(1) == (target if target.dim() == 1 else target.argmax(1))).float().mean()
