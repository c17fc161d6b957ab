"""IDX, the format of MNIST and its kin: a header of big-endian numbers, then bytes; plain or packed with gzip."""

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, one_line

_BYTES = 0x08
"""The header's code for unsigned bytes, the one type of these data sets."""


def read(path: Path, dimensions: int) -> Tensor:
    """The bytes of an IDX file with so many dimensions (3: images [N, H, W]; 1: labels [N]), as uint8.

    Source: yann.lecun.com/exdb/mnist. UserError where the file is damaged or has another type or number of dimensions.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or one_line(error)}") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, _BYTES, dimensions]):
        raise UserError(f"{path} is not an IDX file of bytes with {dimensions} dimension{'s' if dimensions > 1 else ''}: it begins with {content[:4].hex(' ')}")
    shape = np.frombuffer(content, dtype=">u4", count=dimensions, offset=4).astype(int).tolist()
    expected = start + int(np.prod(shape, dtype=object))
    if len(content) != expected:
        raise UserError(f"{path} is damaged: for {' x '.join(map(str, shape))} values it must have {expected} bytes, it has {len(content)}")
    return torch.frombuffer(bytearray(content[start:]), dtype=torch.uint8).view(shape)


def pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, H, W] and labels [N] of `part`, "train" or "t10k"; UserError where a file is missing or their numbers differ."""
    images, labels = (read(find(folder, f"{part}-{what}"), dimensions) for what, dimensions in (("images-idx3-ubyte", 3), ("labels-idx1-ubyte", 1)))
    if len(images) != len(labels):
        raise UserError(f"{folder} has {len(images)} {part} images but {len(labels)} labels")
    return images[:, None], labels.long()


def names(stem: str) -> list[str]:
    """The names under which such files lie around: with a dot in place of the second hyphen, packed or not."""
    dotted = stem.replace("-idx", ".idx")
    return [f"{name}{end}" for name in (stem, dotted) for end in ("", ".gz")]


def find(folder: Path, stem: str) -> Path:
    """The file of that stem; UserError where there is none."""
    found = next((path for name in names(stem) if (path := folder / name).is_file()), None)
    if found is None:
        raise UserError(f"there is no file {stem} or {stem}.gz in {folder}")
    return found
