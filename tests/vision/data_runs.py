"""What the tests of data modules ask of a trainer, and a training run of two steps."""

from lightning.pytorch import Trainer

from interflow_vision.training.classifier import Classifier


class InTraining:
    """What a data module asks a trainer."""

    training, global_rank, world_size, current_epoch = True, 0, 1, 0


def fitted_once(data, folder, **options) -> Trainer:
    quick = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(**quick, enable_progress_bar=False, limit_train_batches=2, default_root_dir=folder)
    trainer.fit(Classifier(width=0.02, lr=0.01, **options), datamodule=data)
    return trainer
