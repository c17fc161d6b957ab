"""The well-known small data sets, read from the files as they are distributed: MNIST, Fashion-MNIST, CIFAR-10, CIFAR-100, SVHN."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import cifar, downloads, idx, svhn
from .arrays import ArrayData, Own

Labelled = tuple[Tensor, Tensor]
"""Images [N, C, H, W], uint8, and classes [N]."""


class MNIST(ArrayData):
    """Handwritten digits: 60,000 grey images of 28x28 pixels for training and 10,000 for test, in IDX files, packed or not.

    They come as RGB, three equal channels, unless `mean` and `std` have one value each. `root` holds the files, or MNIST/raw as torchvision
    keeps it. Source: LeCun, Cortes and Burges. Args and errors: see ArrayData.
    """

    own = Own(28, (0.1307,) * 3, (0.3081,) * 3, crop=2, flip=False)
    folder = "MNIST"
    remote = downloads.MNIST
    class_names: tuple[str, ...] = tuple("0123456789")

    def fetch(self) -> None:
        if self._complete() is None:
            downloads.fetch(self.remote, self.root)

    def _complete(self) -> Path | None:
        """The folder that has all four files."""
        stems = [file.name.removesuffix(".gz") for file in self.remote]
        places = (self.root, self.root / self.folder / "raw", self.root / "raw")
        return next((place for place in places if all(any((place / name).is_file() for name in idx.names(stem)) for stem in stems)), None)

    def read(self) -> tuple[Labelled, Labelled]:
        folder = self._complete()
        if folder is None:
            files = ", ".join(file.name for file in self.remote)
            raise UserError(f"{self.root} does not hold {type(self).__name__}: it needs {files}, packed or not; --data.download true fetches them")
        train, test = idx.pair(folder, "train"), idx.pair(folder, "t10k")
        for images, target in (train, test):
            if images.shape[2:] != (28, 28) or (len(target) and int(target.max()) >= len(self.class_names)):
                raise UserError(f"{folder} does not hold {type(self).__name__}: images must have 28x28 pixels and labels be below {len(self.class_names)}")
        return train, test


class FashionMNIST(MNIST):
    """Pictures of clothes: 60,000 grey images of 28x28 pixels for training and 10,000 for test, in ten classes; files as MNIST's.

    They come as RGB, three equal channels, unless `mean` and `std` have one value each. Debian's package dataset-fashion-mnist has the files:
    --data.root /usr/share/datasets/fashion-mnist. Source: arXiv 1708.07747. Args and errors: see ArrayData.
    """

    own = Own(28, (0.2860,) * 3, (0.3530,) * 3, crop=2, flip=True)
    folder = "FashionMNIST"
    remote = downloads.FASHION_MNIST
    class_names = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


class CIFAR10(ArrayData):
    """Small photographs: 50,000 images of 32x32 pixels for training and 10,000 for test, in ten classes.

    Files: cifar-10-batches-py or cifar-10-batches-bin, unpacked or as the .tar.gz archive; nothing in a pickled file is executed.
    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009. Args and errors: see ArrayData.
    """

    own = Own(32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), crop=4, flip=True)
    classes = 10

    def fetch(self) -> None:
        if not cifar.is_in(self.root, self.classes):
            downloads.fetch(downloads.CIFAR[self.classes], self.root)

    def read(self) -> tuple[Labelled, Labelled]:
        train, test, self.class_names = cifar.read(self.root, self.classes)
        return train, test


class CIFAR100(CIFAR10):
    """Small photographs: 50,000 images of 32x32 pixels for training and 10,000 for test, in a hundred classes: --model.num_classes 100.

    Files: cifar-100-python or cifar-100-binary, unpacked or as the .tar.gz archive; nothing in a pickled file is executed.
    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009. Args and errors: see ArrayData.
    """

    own = Own(32, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762), crop=4, flip=True)
    classes = 100


class SVHN(ArrayData):
    """House numbers: 73,257 cropped digits of 32x32 pixels for training, 26,032 for test, 531,131 easier ones; MATLAB files, read by SciPy.

    Source: Netzer et al., Reading digits in natural images with unsupervised feature learning, 2011. Args and errors: see ArrayData.

    Args:
        root: folder of train_32x32.mat and test_32x32.mat.
        extra: whether training takes the images of extra_32x32.mat too.
        kwargs: as ArrayData.
    """

    own = Own(32, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970), crop=4, flip=False)
    class_names: tuple[str, ...] = tuple("0123456789")

    def __init__(self, root: str, extra: bool = False, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)
        self.extra = extra
        self.save_hyperparameters()

    def fetch(self) -> None:
        downloads.fetch((*downloads.SVHN, downloads.SVHN_EXTRA) if self.extra else downloads.SVHN, self.root)

    def read(self) -> tuple[Labelled, Labelled]:
        parts = [svhn.read(self.root / f"{name}_32x32.mat") for name in (("train", "extra") if self.extra else ("train",))]
        images, target = (torch.cat(each) for each in zip(*parts, strict=True))
        return (images, target), svhn.read(self.root / "test_32x32.mat")
