"""From an image file to a model's input: one rule, kept in the checkpoint, for evaluation and for `interflow predict`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Preprocessing:
    """Shorter side resized to `size` (bilinear, antialiased), the centre cut out, then (x - mean) / std for each channel.

    Ranges: pixels are in [0, 1] before normalisation; `mean` and `std` have one value for each channel, 1 (grey) or 3 (RGB).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: "Image.Image") -> Tensor:
        """A PIL image of any mode -> [channels, size, size]."""
        # 16-bit greyscale is the one mode whose conversion to 8 bits clips instead of scaling
        if image.mode.startswith("I;16"):
            image = image.point(lambda value: value / 256).convert("L")
        image = image.convert("L" if len(self.mean) == 1 else "RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, -1)
        return self.normalize(self.fit(pixels.permute(2, 0, 1).float() / 255))

    def fit(self, x: Tensor) -> Tensor:
        """[..., C, H, W] -> [..., C, size, size]: resized, centre cut out."""
        height, width = x.shape[-2:]
        scale = self.size / min(height, width)
        shape = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        if shape != (height, width):
            x = F.interpolate(x.unflatten(0, (1, -1)) if x.dim() == 3 else x, shape, mode="bilinear", antialias=True).view(*x.shape[:-2], *shape)
        top, left = (shape[0] - self.size) // 2, (shape[1] - self.size) // 2
        return x[..., top : top + self.size, left : left + self.size]

    def normalize(self, x: Tensor) -> Tensor:
        """[..., C, H, W] in [0, 1] -> (x - mean) / std."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        return (x - mean[:, None, None]) / std[:, None, None]

    def read(self, path: str | Path) -> Tensor:
        """An image file -> [channels, size, size]; UserError where it is missing or no image."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(path) as image:
                return self(image)
        except FileNotFoundError:
            raise UserError(f"there is no image {path}") from None
        except UnidentifiedImageError:
            raise UserError(f"{path} is not an image that Pillow can read") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(f"the image {path} cannot be read: {one_line(error)}") from error

    def as_dict(self) -> dict[str, int | list[float]]:
        """What a checkpoint keeps: numbers only."""
        return {"size": self.size, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, kept: dict[str, Sequence[float]]) -> "Preprocessing":
        """The inverse of as_dict."""
        return cls(int(kept["size"]), tuple(kept["mean"]), tuple(kept["std"]))  # type: ignore[call-overload]


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
