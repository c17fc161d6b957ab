"""What is checked before a training begins: numbers of the model's options, and whether data set and model fit each other."""

import math
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..backbones import InterflowNetwork
from ..data.images import Preprocessing
from ..data.modules import ImageFolder
from ..models.vgg import VGG
from ..processes import EveryProcessError

TRAINING_METRICS = ("train/loss", "train/accuracy", "train/images_per_second")
"""What Classifier logs at the end of a training epoch, beside what a validation logs."""


def require_in_range(
    *, lr: float, momentum: float, weight_decay: float, label_smoothing: float, auxiliary_weight: float, branch_loss: float, width: float, warmup: float
) -> None:
    """ValueError for a number that no training can use."""
    for name, value, fits, range_ in (
        ("lr", lr, lr > 0, "above 0"),
        ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
        ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
        ("label_smoothing", label_smoothing, 0 <= label_smoothing < 1, "at least 0 and below 1"),
        ("auxiliary_weight", auxiliary_weight, auxiliary_weight >= 0, "at least 0"),
        ("branch_loss", branch_loss, branch_loss >= 0, "at least 0"),
        ("width", width, width > 0, "above 0"),
        ("warmup", warmup, 0 <= warmup < 1, "at least 0 and below 1"),
    ):
        if not (fits and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, {range_}, got {value}")


def knowledge_of(data: Any, model: VGG | InterflowNetwork) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """What a data module says of its images: `preprocessing` and `class_names`, both kept in checkpoints for `interflow predict`.

    A data module of one's own gives both as attributes: a Preprocessing, and a sequence of strings, one for each class; what lacks is
    warned of once. EveryProcessError where one is something else, or does not fit the model.
    """
    name = type(data).__name__
    rule, names = getattr(data, "preprocessing", None), getattr(data, "class_names", ())
    if rule is not None and not isinstance(rule, Preprocessing):
        raise EveryProcessError(
            f"{name}.preprocessing must be an interflow_vision.data.images.Preprocessing, got {type(rule).__name__}: a checkpoint keeps its numbers"
        )
    if isinstance(names, str) or not all(isinstance(label, str) for label in names):
        raise EveryProcessError(f"{name}.class_names must be a sequence of strings, one for each class, got {names!r}")
    names = tuple(names)
    if names and len(names) != model.num_classes:
        raise EveryProcessError(f"the data set has {len(names)} classes but the model {model.num_classes}: give --model.num_classes {len(names)}")
    if rule is None:
        warnings.warn(f"{name} has no attribute `preprocessing`: `interflow predict` cannot classify files with checkpoints of this run", stacklevel=2)
        return None, names
    if rule.channels != model.in_channels:
        remedy = f"give --model.in_channels {rule.channels}"
        if model.in_channels == 1 and isinstance(data, ImageFolder):
            remedy += ", or --data.mean and --data.std of one value each, for grey images"
        raise EveryProcessError(f"the data set's images have {rule.channels} channels but the model takes {model.in_channels}: {remedy}")
    if isinstance(model, InterflowNetwork) and model.fixed_size not in (None, rule.size):
        raise EveryProcessError(
            f"images of {rule.size} pixels a side do not fit this backbone, which takes {model.fixed_size}: give --data.size {model.fixed_size}, "
            f"or a backbone built for them, --model.backbone_options.img_size {rule.size}"
        )
    if rule.size < model.min_size:
        raise EveryProcessError(f"images of {rule.size} pixels a side are too small for this model's max-pools: give --data.size {model.min_size} or more")
    return rule, names


def kept_knowledge(kept: dict[str, Any], model: VGG | InterflowNetwork) -> tuple[Preprocessing | None, tuple[str, ...]]:
    """The same from what a checkpoint keeps; EveryProcessError where it is broken."""
    names = kept.get("class_names") or []
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names) or len(names) not in (0, model.num_classes):
        raise EveryProcessError(f"the checkpoint cannot be used: class_names must be {model.num_classes} strings, got {names!r}")
    if kept.get("preprocessing") is None:
        return None, tuple(names)
    try:
        rule = Preprocessing.from_dict(kept["preprocessing"])
    except ValueError as error:
        raise EveryProcessError(f"the checkpoint cannot be used: {error}") from error
    if rule.channels != model.in_channels:
        raise EveryProcessError(f"the checkpoint cannot be used: its images have {rule.channels} channels but its model takes {model.in_channels}")
    return rule, tuple(names)


Knowledge = tuple[Preprocessing | None, tuple[str, ...]]
"""The rule by which images are prepared, where there is one, and the names of the classes."""


def require_same_knowledge(data: Knowledge, checkpoint: Knowledge) -> None:
    """EveryProcessError where a run's data set and a checkpoint contradict each other; what one of them lacks is no contradiction."""
    (rule, names), (kept_rule, kept_names) = data, checkpoint
    if None not in (rule, kept_rule) and rule != kept_rule:
        raise EveryProcessError(f"the data set prepares images as {rule}, but the checkpoint's model expects {kept_rule}")
    if names and kept_names and names != kept_names:
        raise EveryProcessError(f"the data set's classes are {_listed(names)}, but the checkpoint's {_listed(kept_names)}")


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)} in all)" if len(names) > 5 else "")


def require_epochs_left(path: Path, checkpoint: dict[str, Any], max_epochs: int | None) -> None:
    """EveryProcessError where a run that goes on from a checkpoint was given fewer epochs than it has begun already."""
    begun = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_progress", {}).get("current", {}).get("ready", 0)
    if max_epochs is not None and 0 <= max_epochs < begun:
        raise EveryProcessError(f"{path} has come to epoch {begun} already, so --trainer.max_epochs {max_epochs} leaves nothing to train: give more")


def require_monitored_metrics(trainer: Trainer, model: LightningModule) -> None:
    """After the sanity check: EveryProcessError where a callback waits for a metric which nothing logs.

    Lightning would say so at the end of the first epoch. Only where model and callbacks are Lightning's or this package's, since others may
    log whatever they like.
    """
    known = {*trainer.callback_metrics, *TRAINING_METRICS}
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(type(one).__module__.partition(".")[0] not in ("lightning", "interflow_vision") for one in (model, *callbacks)):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in known and not monitor.startswith("lr-"):  # those of LearningRateMonitor
            raise EveryProcessError(f"{type(callback).__name__} monitors {monitor!r}, which nothing logs; there are {', '.join(sorted(known))}")
