"""One run of a study: trained by the package's own trainer, gone on with where it was interrupted, its result one JSON file."""

import contextlib
import os
import platform
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from interflow_kernels import __version__

from ..errors import UserError
from ..training.checkpoint_io import SafeCheckpointIO
from ..training.classifier import Classifier
from ..training.finite import NotFiniteError
from ..training.resume_state import KeepRandomStates
from . import datasets, measures, results
from .plan import Run


def perform(run: Run, folder: Path, device: int | None = None) -> results.Result:
    """Trains the run, writes folder/run.path, and returns what it wrote. device: number of a GPU, None for the CPU.

    A run whose loss or weights stop being finite is a result too: its status says "diverged", why, and at which step.
    Raises UserError where data or model do not take what the study gives them.
    """
    began = time.time()
    scratch = folder / results.UNFINISHED / run.path.with_suffix("")
    data = datasets.create(run.options["data"], run.options["recipe"]["batch_size"])
    seed_everything(run.seed, workers=True, verbose=False)
    model = _model(run, data)
    collected = measures.Measurements()
    result = _head(run, model)
    last = scratch / "last.ckpt"
    try:
        trainer = _trainer(run, scratch, collected, device)
        if run.options["model"].get("start") == "equal" and not last.is_file():
            measures.equalise(model.model, _first_images(data, run.options["recipe"]["batch_size"]))
        trainer.fit(model, datamodule=data, ckpt_path=str(last) if last.is_file() else None)
        result |= {"status": "done", **_outcome(run, trainer, model, data)}
    except NotFiniteError as error:
        result |= {"status": "diverged", "why": str(error)}
    kept = collected.kept
    result |= {"epochs": kept["epochs"], "gradients": {"names": list(measures.convolutions(model.model)), "start": kept["start"], "epochs": kept["gradients"]}}
    result |= {"train_seconds": round(kept["seconds"], 2), "seconds": round(time.time() - began, 2), "machine": _machine(device)}
    results.write(folder / run.path, result)
    shutil.rmtree(scratch, ignore_errors=True)
    with contextlib.suppress(OSError):  # another run's checkpoint lies there
        os.removedirs(scratch.parent)
    return result


def _model(run: Run, data: Any) -> Classifier:
    options = {key: value for key, value in run.options["model"].items() if key != "start"}
    recipe = {key: value for key, value in run.options["recipe"].items() if key != "batch_size"}
    channels, classes = data.preprocessing.channels, len(data.class_names)
    try:
        return Classifier(**{**options, **recipe, "lr": run.rate, "in_channels": channels, "num_classes": classes})
    except (TypeError, ValueError) as error:
        raise UserError(f"{run.cell}: {error}") from error


def _trainer(run: Run, scratch: Path, collected: measures.Measurements, device: int | None) -> Trainer:
    keep = ModelCheckpoint(dirpath=scratch, filename="last", save_top_k=1, every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False)
    where: dict[str, Any] = {"accelerator": "cpu"} if device is None else {"accelerator": "gpu", "devices": [device]}
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(
        max_epochs=run.options["data"]["epochs"],
        callbacks=[collected, KeepRandomStates(), keep],
        plugins=[SafeCheckpointIO()],
        default_root_dir=scratch,
        **where,
        **quiet,
    )


def _first_images(data: Any, batch: int) -> torch.Tensor:
    """The first training images, as many as 256 or a batch: the same for all seeds."""
    data.setup("fit")
    return data.parts[0].tensors[0][: max(batch, 256)]


def _head(run: Run, model: Classifier) -> results.Result:
    told = {"cell": {"data": run.cell.data, "network": run.cell.network, "arm": run.cell.arm}, "seed": run.seed, "rate": run.rate, "final": run.final}
    return {
        **told,
        "digest": results.digest(run),
        "options": run.options,
        "parameters": sum(p.numel() for p in model.model.parameters()),
        "versions": {"torch": torch.__version__, "interflow_kernels": __version__},
    }


def _outcome(run: Run, trainer: Trainer, model: Classifier, data: Any) -> results.Result:
    """The last epoch's validation; of a final run the test images, read this once, and the training images without augmentation."""
    validation = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    contribution = {name.removeprefix("contribution/"): float(value) for name, value in trainer.callback_metrics.items() if name.startswith("contribution/")}
    if not run.final:
        return {"validation": validation}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = trainer.test(model, datamodule=data, verbose=False)[0]
    test = {name.removeprefix("test/"): float(value) for name, value in metrics.items()}
    training = measures.accuracy(model.model, *data.parts[0].tensors)
    return {"validation": validation, "contribution": contribution, "test": test, "training": {"accuracy": training}}


def _machine(device: int | None) -> dict[str, Any]:
    name = _processor() if device is None else torch.cuda.get_device_name(device)
    return {"device": name, "threads": torch.get_num_threads(), "python": platform.python_version()}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
