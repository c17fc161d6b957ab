"""What training does to images beyond cutting out and mirroring: torchvision's transforms where it is installed, a crop and a flip where not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import require_torchvision

Transform = Callable[[Tensor], Tensor]
"""Images [B, C, H, W], bytes or numbers in [0, 1] -> the same shape."""

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Normalised images [B, C, H, W], classes [B] -> mixed images, probabilities [B, K]."""


_TORCHVISIONS = {"randaugment": "RandAugment", "erasing": "random erasing", "mixup": "mixup", "cutmix": "CutMix"}
"""Steps that only torchvision has."""


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, and how strongly; 0 leaves a step out.

    In this order: `crop` pads each side by so many black pixels and cuts the old size out at random; `flip` mirrors half of all images;
    `randaugment` applies so many operations of RandAugment at `magnitude`; `erasing` is the part of images in which a rectangle gets the
    mean colour. `mixup` and `cutmix` are the alpha of the Beta distribution; with both, each batch takes one of them at random.

    Sources: RandAugment arXiv 1909.13719, random erasing 1708.04896, mixup 1710.09412, CutMix 1905.04899.

    Raises ValueError for numbers out of range.
    """

    crop: int = 0
    flip: bool = False
    randaugment: int = 0
    magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "randaugment", "mixup", "cutmix"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not 0 <= self.magnitude <= 30:
            raise ValueError(f"magnitude must be between 0 and 30, got {self.magnitude}")
        if not 0 <= self.erasing <= 1:
            raise ValueError(f"erasing must be between 0 and 1, got {self.erasing}")

    def of_images(self, mean: Sequence[float]) -> Transform | None:
        """The steps on images, None where there are none; `mean` of each channel in [0, 1] is the colour of erased rectangles.

        MissingPackageError where a step needs torchvision and it is missing.
        """
        for name, purpose in _TORCHVISIONS.items():
            if getattr(self, name):
                require_torchvision(f"{purpose} (--data.{name})")
        if not (self.crop or self.flip or self.randaugment or self.erasing):
            return None
        return _torchvisions(self, mean) or _own(self)

    def of_batches(self, classes: int) -> Mix | None:
        """mixup and cutmix of whole batches, None where neither is asked for."""
        if not (self.mixup or self.cutmix):
            return None
        from torchvision.transforms import v2

        steps = [v2.MixUp(alpha=self.mixup, num_classes=classes)] if self.mixup else []
        steps += [v2.CutMix(alpha=self.cutmix, num_classes=classes)] if self.cutmix else []
        chosen: Mix = v2.RandomChoice(steps) if len(steps) > 1 else steps[0]
        return chosen


def for_training(given: Any, read: Callable[[Any], Tensor], transform: Transform | None) -> Tensor:
    """read(given), one image [C, H, W], with the steps of training on it."""
    x = read(given)
    return x if transform is None else transform(x[None])[0]


@dataclass(frozen=True)
class _EachImage:
    """A transform of one image on each of a batch: torchvision's draw once for all that they are given."""

    transform: Any

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self.transform(image) for image in x])


@dataclass(frozen=True)
class _CropFlip:
    crop: int
    flip: bool

    def __call__(self, x: Tensor) -> Tensor:
        x = random_crop(x, self.crop) if self.crop else x
        return random_flip(x) if self.flip else x


def _torchvisions(given: Augmentation, mean: Sequence[float]) -> Transform | None:
    """torchvision's transforms of one image after another; None where it is not installed."""
    try:
        from torchvision.transforms import v2
    except Exception:  # missing, or built for another torch
        return None
    steps: list[Any] = [_Crop(given.crop)] if given.crop else []
    steps += [v2.RandomHorizontalFlip()] if given.flip else []
    steps += [v2.RandAugment(num_ops=given.randaugment, magnitude=given.magnitude)] if given.randaugment else []
    steps += [_Erasing(v2, given.erasing, tuple(mean))] if given.erasing else []
    return _EachImage(v2.Compose(steps) if len(steps) > 1 else steps[0])


class _Crop(torch.nn.Module):
    """v2.RandomCrop to the size that the image has."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        from torchvision.transforms import v2

        return v2.RandomCrop(tuple(x.shape[-2:]), padding=self.padding)(x)  # type: ignore[no-any-return, unused-ignore]


class _Erasing(torch.nn.Module):
    """v2.RandomErasing with the mean colour, in the unit of the image."""

    def __init__(self, v2: Any, p: float, mean: tuple[float, ...]) -> None:
        super().__init__()
        self.numbers = v2.RandomErasing(p, value=mean)
        self.bytes = v2.RandomErasing(p, value=tuple(float(round(255 * value)) for value in mean))

    def forward(self, x: Tensor) -> Tensor:
        return (self.numbers if x.is_floating_point() else self.bytes)(x)


def _own(given: Augmentation) -> Transform:
    return _CropFlip(given.crop, given.flip)


def random_crop(x: Tensor, padding: int) -> Tensor:
    """Each image of [B, C, H, W] shifted by up to `padding` pixels in both directions, uniformly; what comes in from outside is 0."""
    count, channels, height, width = x.shape
    padded = F.pad(x, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, count), device=x.device)
    rows = (top[:, None] + torch.arange(height, device=x.device))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width, device=x.device))[:, None, None, :]
    image = torch.arange(count, device=x.device)[:, None, None, None]
    return padded[image, torch.arange(channels, device=x.device)[None, :, None, None], rows, columns]


def random_flip(x: Tensor) -> Tensor:
    """Each image of [B, C, H, W] mirrored or not, half of them on average."""
    mirrored = torch.rand(len(x), device=x.device) < 0.5
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)
