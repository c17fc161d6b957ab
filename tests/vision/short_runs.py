"""A training of three steps of a tiny network on the digits, with what a test wants to be different."""

from lightning.pytorch import Trainer, seed_everything

from interflow_vision.data.modules import Digits
from interflow_vision.training.classifier import Classifier

TINY = {"width": 0.0625, "lr": 0.02}


def trainer(folder, **options) -> Trainer:
    quick = {"max_epochs": 1, "limit_train_batches": 3, "limit_val_batches": 2, "accelerator": "cpu", "log_every_n_steps": 1, "enable_checkpointing": False}
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder, "logger": False}
    return Trainer(**{**quick, **silent, **options})


def data(**options) -> Digits:
    return Digits(**{"size": 16, "batch_size": 16, **options})


def fitted(folder, model=None, run=None, **options) -> Classifier:
    seed_everything(0, verbose=False)
    model = Classifier(**{**TINY, **options}) if model is None else model
    (run or trainer(folder)).fit(model, datamodule=data())
    return model
