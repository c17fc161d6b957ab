"""Data sets that fit into memory as bytes: a whole batch is read at once, and resized once at the start."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError
from .base import ImageData, at_least
from .images import Preprocessing
from .splitting import held_out
from .transforms import Augmentation, Transform

_PIECE = 4096
"""Images that are resized at once."""


class Arrays(Dataset[tuple[Tensor, Tensor]]):
    """Images [N, C, H, W], uint8, with classes [N], or those at `indices` of them; a batch is one indexing, not N.

    Args:
        images, target: of the whole data set, which parts share.
        indices: those that belong to this part; default all.
        transform: what is done to a batch of images; random numbers are torch's.
    """

    def __init__(self, images: Tensor, target: Tensor, indices: Tensor | None = None, transform: Transform | None = None) -> None:
        self.images, self.target, self.indices, self.transform = images, target, indices, transform

    def __len__(self) -> int:
        return len(self.target if self.indices is None else self.indices)

    def __getitems__(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch: [B, C, H, W] and [B]. DataLoader asks for it where it is there."""
        chosen = torch.as_tensor(numbers)
        chosen = chosen if self.indices is None else self.indices[chosen]
        x = self.images[chosen]
        return (x if self.transform is None else self.transform(x)), self.target[chosen]

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        x, target = self.__getitems__([number])
        return x[0], target[0]

    @staticmethod
    def collate(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What __getitems__ gave is a batch already."""
        return batch


@dataclass(frozen=True)
class Own:
    """What a data set brings along where nothing else is given: pixels of a side, mean and std of its training images, augmentation."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int
    flip: bool


class ArrayData(ImageData):
    """A data set with training and test images, of which some training images are held out for validation.

    The test images are never seen before the test. The same seed holds out the same images, every class in proportion.

    Args:
        root: folder of the files.
        download: whether missing files are fetched.
        batch_size: images in a step of one process.
        size: pixels of a side; default the data set's own.
        validation: training images that are held out for validation.
        seed: of that choice.
        num_workers: processes that read and augment images.
        mean: of each channel, in [0, 1]; default the data set's own. One value: images are grey, for in_channels=1; three: RGB.
        std: likewise.
        crop: training images are padded by so many pixels and cut out at random; 0 for neither.
        flip: whether half of the training images are mirrored.
        randaugment: operations of RandAugment on each training image; needs torchvision.
        magnitude: of RandAugment, 0 to 30.
        erasing: part of the training images in which a rectangle is erased; needs torchvision.
        mixup: alpha of mixup, 0 for none; needs torchvision.
        cutmix: alpha of CutMix, 0 for none; needs torchvision.

    Raises ValueError for numbers out of range.
    """

    own: Own

    def __init__(
        self,
        root: str,
        download: bool = False,
        batch_size: int = 128,
        size: int | None = None,
        validation: int = 5000,
        seed: int = 0,
        num_workers: int = 0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop: int | None = None,
        flip: bool | None = None,
        randaugment: int = 0,
        magnitude: int = 9,
        erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        own = self.own
        crop, flip = own.crop if crop is None else crop, own.flip if flip is None else flip
        super().__init__(batch_size, num_workers, Augmentation(crop, flip, randaugment, magnitude, erasing, mixup, cutmix))
        at_least("validation", validation, 1)
        self.save_hyperparameters()
        self.root = Path(root)
        self.download = download
        self.validation = validation
        self.seed = seed
        mean, std = own.mean if mean is None else mean, own.std if std is None else std
        self.preprocessing = Preprocessing(own.size if size is None else size, tuple(mean), tuple(std), bits=8)

    @abstractmethod
    def fetch(self) -> None:
        """Downloads what is missing below `root`."""

    @abstractmethod
    def read(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test: images [N, C, H, W], uint8, and classes [N]; sets class_names where they are in the files."""

    def prepare_data(self) -> None:
        """Downloads, if asked to; UserError where there is no folder."""
        if self.download:
            self.fetch()
        elif not self.root.is_dir():
            raise UserError(f"there is no folder {self.root} for --data.root; --data.download true makes it and fetches the files")

    def setup(self, stage: str | None = None) -> None:
        """Reads the files, resizes and splits; UserError where files are missing or damaged."""
        if self.parts:
            return
        self.prepare_data()
        (images, target), (test_images, test_target) = self.read()
        if not len(images) or not len(test_images):
            raise UserError(f"{self.root} has {len(images)} training and {len(test_images)} test images: it needs some of both")
        transform = self.image_transform(min(images.shape[1], self.preprocessing.channels))
        images, test_images = (fitted(x, self.preprocessing) for x in (images, test_images))
        training, validation = held_out(target, self.validation, self.seed)
        self.parts = [
            Arrays(images, target, training, transform),
            Arrays(images, target, validation),
            Arrays(test_images, test_target),
        ]


def fitted(images: Tensor, rule: Preprocessing) -> Tensor:
    """[N, C, H, W], uint8 -> [N, c, size, size], uint8, as `rule` prepares single files: c is 1 where the images are grey or the rule makes them so."""
    if rule.channels == 1 and images.shape[1] == 3:
        images = grey(images)
    if images.shape[-2:] == (rule.size, rule.size):
        return images
    pieces = [(rule.fit(piece.float() / 255) * 255).round().clamp(0, 255).to(torch.uint8) for piece in images.split(_PIECE)]
    return torch.cat(pieces)


def grey(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W], uint8, with Pillow's weights and rounding (ITU-R 601-2), so that files of the same images give the same."""
    weights = torch.tensor([19595, 38470, 7471], dtype=torch.int32)[:, None, None]
    return torch.cat([((piece.int() * weights).sum(1, keepdim=True) + 0x8000).bitwise_right_shift(16).to(torch.uint8) for piece in images.split(_PIECE)])
