"""From an image to a model's input: one rule, kept in the checkpoint, for training, evaluation and `interflow predict`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, one_line
from . import decoding

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """The largest square in the centre cut out, resized to `size` (bilinear, antialiased), then (x - mean) / std for each channel.

    Cut out before it is resized, so that memory does not grow with the longer side of a narrow image.
    Ranges: pixels are in [0, 1] before normalisation, see decoding.py; `mean` and `std` have one value for each channel, 1 (grey) or 3 (RGB).
    With `bits` 8, resized pixels are rounded to 256 steps before normalisation, and travel from files to the device as bytes, a quarter of
    the size; 32 keeps them as they are, which images of 16 bits need.

    Raises ValueError for a size below 1, for means and standard deviations of other or unequal numbers of channels, for values that
    are not finite or a std that is not above 0, and for other bits.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    bits: int = 32

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if len(self.mean) not in (1, 3) or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must both have 1 value (grey images) or both 3 (RGB), got {len(self.mean)} and {len(self.std)}")
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean must have finite values, got {list(self.mean)}")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std must have finite values above 0, got {list(self.std)}")
        if self.bits not in (8, 32):
            raise ValueError(f"bits must be 8 or 32, got {self.bits}")

    @property
    def channels(self) -> int:
        """Of the model's input: 1 (grey) or 3 (RGB)."""
        return len(self.mean)

    def __call__(self, image: "Image.Image") -> Tensor:
        """A PIL image of any mode -> [channels, size, size]. ValueError where its values lie outside their range, see decoding.py."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: "Image.Image", training: bool = False) -> Tensor:
        """The same before normalisation: [channels, size, size], in [0, 1], or bytes where `bits` is 8.

        For training a part cut out at random in place of the centre, mirrored in half of all cases.
        """
        image = decoding.upright(image)
        if training:
            x = resized(decoding.pixels(image, self.channels, random_box(image.width, image.height)), self.size)
            return self._stored(x.flip(-1) if torch.rand(()) < 0.5 else x)
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        return self._stored(self.fit(decoding.pixels(image, self.channels, (left, top, left + side, top + side))))

    def augmented(self, image: "Image.Image") -> Tensor:
        """What training sees of an image, normalised -> [channels, size, size]."""
        return self.normalize(self.pixels(image, training=True))

    def _stored(self, x: Tensor) -> Tensor:
        return (x * 255).round().clamp(0, 255).to(torch.uint8) if self.bits == 8 else x

    def fit(self, x: Tensor) -> Tensor:
        """[..., C, H, W] -> [..., C, size, size]: the largest square in the centre, resized."""
        height, width = x.shape[-2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resized(x[..., top : top + side, left : left + side], self.size)

    def normalize(self, x: Tensor) -> Tensor:
        """[..., C, H, W] in [0, 1], or bytes, on any device -> (x - mean) / std; one channel is repeated where the rule has three."""
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return (x - mean) / std

    def read(self, path: str | Path, training: bool = False) -> Tensor:
        """An image file -> [channels, size, size], for training `augmented`; UserError where it is missing, no image or out of range."""
        return self.normalize(self.read_pixels(path, training))

    def read_pixels(self, path: str | Path, training: bool = False) -> Tensor:
        """The same before normalisation, see `pixels`."""
        return self.pixels_of(decoding.load(path), path, training)

    def pixels_of(self, image: "Image.Image", name: str | Path, training: bool = False) -> Tensor:
        """`pixels` of an image that is called `name`; UserError where its values are out of range."""
        try:
            return self.pixels(image, training)
        except ValueError as error:
            raise UserError(f"the image {name} cannot be read: {one_line(error)}") from error

    def as_dict(self) -> dict[str, int | list[float]]:
        """What a checkpoint keeps: numbers only."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std), "bits": self.bits}

    @classmethod
    def from_dict(cls, kept: Any) -> "Preprocessing":
        """The inverse of as_dict; ValueError where `kept` is not what as_dict gives."""
        try:
            mean, std = (tuple(float(value) for value in kept[key]) for key in ("mean", "std"))
            return cls(int(kept["size"]), mean, std, int(kept.get("bits", 32)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
            raise ValueError(f"the rule by which images are prepared is broken: {what}") from error


def resized(x: Tensor, size: int) -> Tensor:
    """[C, H, W] or [B, C, H, W] -> H and W become `size`: bilinear, antialiased."""
    if x.shape[-2:] == (size, size):
        return x
    batch = x[None] if x.dim() == 3 else x
    return F.interpolate(batch, (size, size), mode="bilinear", antialias=True).view(*x.shape[:-2], size, size)


def random_box(width: int, height: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> decoding.Box:
    """A part of an image at random, as torchvision's RandomResizedCrop picks it.

    Its area is `scale` of the image's (uniform), its width over its height `ratio` (uniform in the logarithm). Where ten tries give none that
    fits, as for narrow images, it is the largest part in the centre whose ratio is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area, shape = torch.rand(2, dtype=torch.float64).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area)
        shape = math.exp(low + (high - low) * shape)
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            return left, top, left + w, top + h
    w, h = max(1, min(width, round(height * ratio[1]))), max(1, min(height, round(width / ratio[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def random_affine(x: Tensor, shift: float, degrees: float, scale: float) -> Tensor:
    """Each image of the batch shifted, turned and scaled at random (bilinear; what comes in from outside repeats the edge).

    x [B, C, H, W]; shift in pixels, up to +-shift in both directions; up to +-degrees; size times 1 - scale to 1 + scale.
    """
    uniform = torch.rand(4, x.shape[0], device=x.device, dtype=x.dtype) * 2 - 1  # [4, B]
    angle, zoom = uniform[0] * math.radians(degrees), 1 / (1 + uniform[1] * scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    # affine_grid counts in half image sizes
    dx, dy = uniform[2] * (2 * shift / x.shape[3]), uniform[3] * (2 * shift / x.shape[2])
    theta = torch.stack([torch.stack([cos, -sin, dx], 1), torch.stack([sin, cos, dy], 1)], 1)  # [B, 2, 3]
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
