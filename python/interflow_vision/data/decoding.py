"""From an image file to pixels in [0, 1]: the one way in which training, evaluation and `interflow predict` read images.

Ranges: what counts as 0 (black) and 1 (white) follows from the kind of file alone, so that it is the same for every image.

    8 bits a channel          0 to 255
    16 bits, either order     0 to 65535
    32-bit integers           0 to 65535: such files are 16-bit images in a wider type
    floating point            0.0 to 1.0
    1 bit                     0 and 1

An image with values outside its range is refused, never clipped. So is a 16- or 32-bit image whose brightest value is 1 to 255:
it holds 8-bit values in a wider type, and would come out black. Transparent images lie on white, so that colours hidden under
alpha 0 do not count. The EXIF orientation is applied. Of an animation or a file of many pages the first image counts.
"""

import io
import os
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from torch import Tensor

from ..errors import UserError, one_line

if TYPE_CHECKING:
    from PIL import Image

Box = tuple[int, int, int, int]
"""left, top, right, bottom in pixels."""

PIPE_LIMIT = 1 << 30
"""Bytes that are read at most from a pipe or from standard input."""

_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def load(path: str | Path) -> "Image.Image":
    """The image in a file, upright and in memory; "-" is standard input. UserError where it is missing, damaged or no image.

    A pipe is read to its end; other things that are no files (devices, sockets) are refused.
    """
    return _decoded(lambda: _opened(path), path)


def load_bytes(content: bytes, name: str) -> "Image.Image":
    """The same of a file's content, which errors call `name`."""
    return _decoded(lambda: io.BytesIO(content), name)


def _decoded(opened: Callable[[], BinaryIO], path: str | Path) -> "Image.Image":
    from PIL import Image, UnidentifiedImageError

    try:
        with opened() as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on images that it reads all the same
            with Image.open(file) as image:
                image.load()
                return upright(image)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"there is no image {path}") from None
    except UnidentifiedImageError:
        raise UserError(f"{path} is not an image that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"the image {path} has too many pixels to be read safely: make it smaller ({one_line(error)})") from None
    except OSError as error:
        raise UserError(f"the image {path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:  # by what is damaged in which format, Pillow raises almost anything
        raise UserError(f"the image {path} cannot be read: {one_line(error)}") from error


def upright(image: "Image.Image") -> "Image.Image":
    """The image as its EXIF orientation says that it is to be seen."""
    from PIL import ImageOps

    return image if image.getexif().get(0x0112, 1) == 1 else ImageOps.exif_transpose(image)


def _opened(path: str | Path) -> BinaryIO:
    """A file that Pillow can go back and forth in: of pipes and standard input a copy in memory.

    Never a path: then Pillow 13 maps some TIFF files into memory and mixes up their rows where the orientation turns them by 90 degrees.
    """
    if str(path) == "-":
        return _all_of(sys.stdin.buffer, path)
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISFIFO(mode)):
        raise UserError(f"{path} is neither a file nor a pipe, so no image can be read from it")
    file = open(path, "rb")  # noqa: SIM115  # closed by the caller
    if not stat.S_ISFIFO(mode):
        return file
    with file:
        return _all_of(file, path)


def _all_of(stream: BinaryIO, name: str | Path) -> BinaryIO:
    content = stream.read(PIPE_LIMIT + 1)
    if len(content) > PIPE_LIMIT:
        raise UserError(f"more than {PIPE_LIMIT >> 20} MiB came from {name}: no image is that large")
    if not content:
        raise UserError(f"nothing came from {name}, so there is no image to read")
    return io.BytesIO(content)


def pixels(image: "Image.Image", channels: int, box: Box | None = None) -> Tensor:
    """Pixels of an upright image of any mode, or of the part inside `box`: [channels, H, W] in [0, 1]; 1 channel is grey, 3 are RGB.

    ValueError where values lie outside the range of the image's kind (see the file's first lines).
    """
    if image.width < 1 or image.height < 1:
        raise ValueError("it has no pixels")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = _wide(image)  # the whole image: whether its values fit must not depend on the box
        if box is not None:
            left, top, right, bottom = box
            values = values[top:bottom, left:right]
        return values.expand(channels, -1, -1)
    if box is not None:
        image = image.crop(box)
    image = _on_white(image).convert("L" if channels == 1 else "RGB")
    raw = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return raw.view(image.height, image.width, channels).permute(2, 0, 1).float() / 255


def _on_white(image: "Image.Image") -> "Image.Image":
    """The image on a white ground where it has transparency: an alpha channel, or a colour or palette entries that are transparent."""
    from PIL import Image

    if image.mode not in _WITH_ALPHA and "transparency" not in image.info:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


def _wide(image: "Image.Image") -> Tensor:
    """A 16-bit, 32-bit or floating-point image -> [H, W] in [0, 1]; ValueError where it has other values."""
    content = bytearray(image.tobytes())
    if image.mode == "F":
        values = torch.frombuffer(content, dtype=torch.float32)
        low, high = (x.item() for x in values.aminmax())
        if not (low >= 0 and high <= 1):  # NaN too
            found = f"from {low:g} to {high:g}" if low <= high else "that are not numbers"
            raise ValueError(f"floating-point images must have values from 0 to 1, but it has values {found}")
        return values.view(image.height, image.width)
    if image.mode == "I":
        values = torch.frombuffer(content, dtype=torch.int32)
    else:
        swapped = image.mode == "I;16B" or (image.mode == "I;16N" and sys.byteorder == "big")
        high_low = torch.frombuffer(content, dtype=torch.uint8).view(-1, 2).int()
        values = high_low[:, 0] * 256 + high_low[:, 1] if swapped else high_low[:, 1] * 256 + high_low[:, 0]
    low, high = (int(x) for x in values.aminmax())
    kind = "32-bit" if image.mode == "I" else "16-bit"
    if low < 0 or high > 65535:
        raise ValueError(f"{kind} images must have values from 0 to 65535, but it has values from {low} to {high}")
    if 0 < high <= 255:
        raise ValueError(f"it is a {kind} image whose values end at {high}, so it would be black: save it with 8 bits, or scale it to 0 ... 65535")
    scaled = values.float() / 65535
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG's one transparent grey
        scaled[values == transparent] = 1.0
    return scaled.view(image.height, image.width)
