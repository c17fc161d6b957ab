"""Data sets that the library `datasets` has saved to a disk: images by an image column, classes by a label column."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import MissingPackageError, UserError, one_line
from . import decoding
from .base import IMAGENET_MEAN, IMAGENET_STD, ImageData, at_least
from .images import Preprocessing
from .splitting import held_out
from .transforms import Augmentation, for_training


class HuggingFace(ImageData):
    """A data set of Hugging Face's `datasets`, as save_to_disk leaves it; rows stay on the disk, and images are read as files are.

    Its splits: train; validation (or val, valid, dev), without which `validation` training images are held out; test, without which test
    uses the validation images. From training images a part is cut out at random and mirrored in half of all cases.

    Args:
        root: the folder that save_to_disk has written.
        image: name of the column of images.
        label: name of the column of classes.
        batch_size: images in a step of one process.
        size: pixels of a side.
        validation: training images that are held out where there is no split for validation.
        seed: of that choice.
        num_workers: processes that read images.
        mean: of each channel, in [0, 1]; default ImageNet's. One value: images become grey, for in_channels=1.
        std: likewise.
        bits: 8 rounds resized pixels to 256 steps, a quarter of the bytes for the device; 32 does not, for images of 16 bits.
        randaugment: operations of RandAugment on each training image; needs torchvision.
        magnitude: of RandAugment, 0 to 30.
        erasing: part of the training images in which a rectangle is erased; needs torchvision.
        mixup: alpha of mixup, 0 for none; needs torchvision.
        cutmix: alpha of CutMix, 0 for none; needs torchvision.

    Raises ValueError for numbers out of range.
    """

    def __init__(
        self,
        root: str,
        image: str = "image",
        label: str = "label",
        batch_size: int = 32,
        size: int = 224,
        validation: int = 5000,
        seed: int = 0,
        num_workers: int = 2,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        bits: int = 8,
        randaugment: int = 0,
        magnitude: int = 9,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__(batch_size, num_workers, Augmentation(0, False, randaugment, magnitude, erasing, mixup, cutmix))
        at_least("validation", validation, 1)
        self.save_hyperparameters()
        self.root = Path(root)
        self.image, self.label = image, label
        self.validation, self.seed = validation, seed
        self.preprocessing = Preprocessing(size, tuple(mean), tuple(std), bits)

    def setup(self, stage: str | None = None) -> None:
        """Opens the data set; UserError where it is none, or lacks a column or a split."""
        if self.parts:
            return
        splits = self._splits()
        train = splits.get("train")
        if train is None:
            raise UserError(f"{self.root} has no split 'train', only {', '.join(map(repr, splits))}")
        self.class_names = self._class_names(train)
        validation = next((splits[name] for name in ("validation", "val", "valid", "dev") if name in splits), None)
        if validation is None:
            training, held = held_out(torch.as_tensor(train[self.label][:]), self.validation, self.seed)
            train, validation = train.select(training.tolist()), train.select(held.tolist())
        transform = self.image_transform()
        read = partial(for_training, read=partial(self._pixels, training=True), transform=transform)
        self.parts = [Rows(part, self.image, self.label, how) for part, how in ((train, read), (validation, self._pixels))]
        self.parts.append(Rows(splits["test"], self.image, self.label, self._pixels) if "test" in splits else self.parts[1])

    def _pixels(self, cell: Any, training: bool = False) -> Tensor:
        """An image as the column keeps it, encoded, with the path that it had."""
        name = cell.get("path") or f"an image of {self.root}"
        image = decoding.load(cell["path"]) if cell.get("bytes") is None else decoding.load_bytes(cell["bytes"], name)
        return self.preprocessing.pixels_of(image, name, training)

    def _splits(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError as error:
            raise MissingPackageError("--data HuggingFace needs the package datasets, which is not installed: pip install datasets") from error
        if not self.root.is_dir():
            raise UserError(f"there is no folder {self.root}; it must be one that the `datasets` library has written with save_to_disk")
        try:
            found = datasets.load_from_disk(str(self.root))
        except Exception as error:  # by what is missing or damaged, of many kinds
            raise UserError(f"{self.root} is not a data set that save_to_disk has written: {one_line(error)}") from error
        splits = dict(found) if isinstance(found, datasets.DatasetDict) else {"train": found}
        for name, split in splits.items():
            for column in (self.image, self.label):
                if column not in split.column_names:
                    columns = ", ".join(split.column_names)
                    option = "image" if column == self.image else "label"
                    raise UserError(f"the split {name!r} of {self.root} has no column {column!r}, only {columns}: give --data.{option}")
            if not isinstance(split.features[self.image], datasets.Image):
                raise UserError(f"the column {self.image!r} of {self.root} must have the feature Image, it has {split.features[self.image]}")
            splits[name] = split.cast_column(self.image, datasets.Image(decode=False))
        return splits

    def _class_names(self, train: Any) -> tuple[str, ...]:
        names = getattr(train.features[self.label], "names", None)
        return tuple(names) if names else tuple(map(str, range(int(max(train.unique(self.label))) + 1)))


class Rows(Dataset[tuple[Tensor, int]]):
    """Images and classes of a split, read from the disk when they are asked for."""

    def __init__(self, split: Any, image: str, label: str, read: Callable[[Any], Tensor]) -> None:
        self.split, self.image, self.label, self.read = split, image, label, read

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        row = self.split[index]
        return self.read(row[self.image]), int(row[self.label])
