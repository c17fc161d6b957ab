"""The data sets as LightningDataModules: scikit-learn's digits, and any folder of images."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..errors import UserError
from .base import IMAGENET_MEAN, IMAGENET_STD, ImageData, at_least
from .folders import ClassFolders, difference
from .images import Preprocessing, random_affine
from .loading import ResumableLoader
from .splitting import stratified
from .transforms import Augmentation, for_training

DIGITS_SPLIT = (1077, 360, 360)
"""Images for training, validation and test; 1,797 in all."""

# Over the pixels of the 1,077 training images of seed 0, in [0, 1].
DIGITS_MEAN, DIGITS_STD = 0.3063, 0.3766


def digits_split(target: Tensor, seed: int) -> list[Tensor]:
    """Indices of the three parts: disjoint, everything used, every class in proportion; the same for the same seed.

    target [N] -> index tensors of DIGITS_SPLIT's sizes.
    """
    return stratified(target, DIGITS_SPLIT, seed)


class Digits(LightningDataModule):
    """scikit-learn's digits: 1,797 real 8x8 images of handwritten digits, resized, as RGB. Nothing is downloaded.

    1,077 images for training, 360 for validation (which picks the best checkpoint), 360 for test.

    Args:
        batch_size: images in a step.
        size: pixels of a side after bilinear resizing from 8.
        seed: of the split; the same for all runs that are compared.
        shift: training images are shifted at random by up to this many of the original 8 pixels,
        degrees: turned by up to this angle,
        scale: and made smaller or larger by up to this fraction.
    """

    class_names = tuple("0123456789")

    def __init__(self, batch_size: int = 64, size: int = 32, seed: int = 0, shift: float = 0.5, degrees: float = 10.0, scale: float = 0.1) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("size", size, 1)
        for name, value in (("shift", shift), ("degrees", degrees), ("scale", scale)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
        if scale >= 1:
            raise ValueError(f"scale must be below 1, got {scale}: images would vanish")
        self.save_hyperparameters()
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = {"shift": shift * size / 8, "degrees": degrees, "scale": scale}
        self.preprocessing = Preprocessing(size, (DIGITS_MEAN,) * 3, (DIGITS_STD,) * 3)
        self.parts: list[TensorDataset] = []

    def setup(self, stage: str | None = None) -> None:
        """Reads the images from scikit-learn's package and splits them."""
        if self.parts:
            return
        from sklearn.datasets import load_digits

        images, target = load_digits(return_X_y=True)
        target = torch.from_numpy(target).long()
        pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16  # 0 to 16 shades of ink
        x = self.preprocessing.normalize(self.preprocessing.fit(pixels).expand(-1, 3, -1, -1))
        self.parts = [TensorDataset(x[part], target[part]) for part in digits_split(target, self.seed)]

    def _loader(self, part: int) -> DataLoader[Any]:
        training = part == 0
        return ResumableLoader(self.parts[part], self.batch_size, shuffle=training, drop_last=training and len(self.parts[part]) > self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(2)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Random shift, rotation and size, on the whole batch on its device, while training only."""
        if self.trainer is None or not self.trainer.training:
            return batch
        x, target = batch
        return random_affine(x, **self.augmentation), target


class ImageFolder(ImageData):
    """A folder of images, root/train/<class>/*.jpg, root/val/<class>/*, and root/test/<class>/* (without it, test uses val).

    Files are found and classes numbered as torchvision's ImageFolder does (folders.py), without hidden files and folders; images are read
    as decoding.py says. From training images a part is cut out at random (as torchvision's RandomResizedCrop does) and mirrored in half of
    all cases, from the others the square in the centre.

    Args:
        root: the folder.
        batch_size: images in a step of one process.
        size: pixels of a side.
        num_workers: processes that read images.
        mean: of each channel, in [0, 1]; default ImageNet's, as pretrained weights expect. One value: images become grey, for in_channels=1.
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
        batch_size: int = 32,
        size: int = 224,
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
        self.save_hyperparameters()
        self.root = Path(root)
        self.preprocessing = Preprocessing(size, tuple(mean), tuple(std), bits)

    def prepare_data(self) -> None:
        """UserError where a folder is missing."""
        for folder in (self.root, self.root / "train", self.root / "val"):
            if not folder.is_dir():
                raise UserError(f"there is no folder {folder}; the data set must have train/<class>/ and val/<class>/ below {self.root}")

    def setup(self, stage: str | None = None) -> None:
        """Lists the images; UserError where a class has none or the parts differ in their classes."""
        if self.parts:
            return
        self.prepare_data()
        rule = self.preprocessing
        test = "test" if (self.root / "test").is_dir() else "val"
        training = partial(for_training, read=partial(rule.read_pixels, training=True), transform=self.image_transform())
        parts: list[ClassFolders] = []
        for name, read in (("train", training), ("val", rule.read_pixels), (test, rule.read_pixels)):
            part = ClassFolders(self.root / name, read)
            if parts and part.classes != parts[0].classes:
                raise UserError(f"{self.root / name} has other classes than {self.root / 'train'}: {difference(part.classes, parts[0].classes)}")
            parts.append(part)
        self.class_names = tuple(parts[0].classes)
        self.parts = parts
