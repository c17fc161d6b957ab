"""Data modules by the names that a plan uses: scikit-learn's digits, and Fashion-MNIST from its IDX files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from ..data import idx, known
from ..data.images import Preprocessing
from ..data.loading import ResumableLoader
from ..data.modules import Digits
from ..errors import UserError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts the files."""


def create(options: Mapping[str, Any], batch_size: int) -> LightningDataModule:
    """The data module for a plan's options without "epochs": source "digits" or "fashion-mnist", and what each takes; UserError for another source."""
    given = {key: value for key, value in options.items() if key not in ("source", "epochs")}
    sources = {"digits": Digits, "fashion-mnist": FashionMNIST}
    if options["source"] not in sources:
        raise UserError(f"source must be one of {', '.join(sources)}, got {options['source']!r}")
    try:
        return sources[options["source"]](batch_size=batch_size, **given)
    except TypeError as error:
        raise UserError(f"the data set {options['source']!r} does not take what the study gives it: {error}") from error


def fashion_mnist(root: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images uint8 [60000, 28, 28] and labels [60000] for training, [10000, 28, 28] and [10000] for test; UserError where a file is missing or broken."""
    (images, labels), (test, test_labels) = idx.pair(root, "train"), idx.pair(root, "t10k")
    return images[:, 0], labels, test[:, 0], test_labels


class FashionMNIST(LightningDataModule):
    """A part of Fashion-MNIST's 60,000 training images for training, another for validation, and its 10,000 test images; grey, resized, not augmented.

    Args:
        batch_size: images in a step.
        train, validation: how many images, drawn once with `split_seed`: the same for all runs that are compared.
        size: pixels of a side after bilinear resizing from 28.
        root: the folder of the four IDX files.
        split_seed: of the draw.
    """

    class_names = known.FashionMNIST.class_names

    def __init__(self, batch_size: int, train: int, validation: int, size: int = 32, root: str | Path = FASHION_MNIST, split_seed: int = 0) -> None:
        super().__init__()
        if train < 1 or validation < 1 or train + validation > 60_000:
            raise UserError(f"train and validation must be at least 1 and together at most 60,000, got {train} and {validation}")
        self.batch_size, self.sizes, self.size, self.root, self.split_seed = batch_size, (train, validation), size, Path(root), split_seed
        self.preprocessing = Preprocessing(size, (0.5,), (0.5,))  # until setup knows the training images
        self.parts: list[TensorDataset] = []

    def setup(self, stage: str | None = None) -> None:
        """Reads, draws, resizes; mean and standard deviation are those of the training images."""
        if self.parts:
            return
        images, labels, test, test_labels = fashion_mnist(self.root)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.split_seed))
        chosen = [order[: self.sizes[0]], order[self.sizes[0] : sum(self.sizes)]]
        pixels = images[chosen[0]].float() / 255
        self.preprocessing = Preprocessing(self.size, (round(float(pixels.mean()), 4),), (round(float(pixels.std()), 4),))
        for x, y in (*((images[part], labels[part]) for part in chosen), (test, test_labels)):
            self.parts.append(TensorDataset(self.preprocessing.normalize(self.preprocessing.fit(x[:, None].float() / 255)), y))

    def _loader(self, part: int) -> DataLoader[Any]:
        training = part == 0
        return ResumableLoader(self.parts[part], self.batch_size, shuffle=training, drop_last=training and self.sizes[0] > self.batch_size)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(0)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader(2)
