"""What all image data modules share: options of augmentation, loaders, and normalisation on the device."""

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .images import Preprocessing
from .loading import ResumableLoader
from .order import SharedShuffle
from .transforms import Augmentation, Mix, Transform

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageData(LightningDataModule):
    """A data module whose loaders give pixels as bytes [B, C, H, W] (or numbers in [0, 1]) and classes [B].

    They are normalised on the device that the batch was moved to; mixup and CutMix come after that, while training, and turn classes into
    probabilities [B, K]. A subclass sets `preprocessing`, `class_names` and, in setup, `parts`: data sets for training, validation and test.

    Raises ValueError for numbers out of range.
    """

    preprocessing: Preprocessing
    class_names: tuple[str, ...] = ()

    def __init__(self, batch_size: int, num_workers: int, augmentation: Augmentation) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.augmentation = augmentation
        self.parts: list[Any] = []
        self._mix: Mix | None = None

    def rank_and_world(self) -> tuple[int, int]:
        """This process's number and how many there are."""
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def image_transform(self, channels: int | None = None) -> Transform | None:
        """The steps on training images that have so many channels; default the model's."""
        return self.augmentation.of_images(self.preprocessing.mean[: channels or self.preprocessing.channels])

    def loader(self, part: int) -> DataLoader[Any]:
        """Of a part: the training images shuffled, the same for any number of processes; the others in order."""
        dataset: Dataset[Any] = self.parts[part]
        training = part == 0
        return ResumableLoader(
            dataset,
            self.batch_size,
            sampler=SharedShuffle(dataset, *reversed(self.rank_and_world())) if training else None,
            drop_last=training and len(dataset) > self.batch_size,  # type: ignore[arg-type]
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=getattr(dataset, "collate", None),
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self.loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self.loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self.loader(2)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalises; mixes images while training only."""
        x, target = batch
        x = self.preprocessing.normalize(x)
        if self.trainer is None or not self.trainer.training:
            return x, target
        if self._mix is None:
            self._mix = self.augmentation.of_batches(len(self.class_names)) or _unmixed
        return self._mix(x, target)


def _unmixed(x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return x, target


def at_least(name: str, value: int, least: int) -> None:
    """ValueError for a number that is too small."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
