"""Folders of images: which files count, in which order, and the data set that reads one part of them."""

import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from ..errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Of files that count as images, in any case of letters: torchvision's list."""


def images_below(folder: Path) -> list[Path]:
    """The image files in a folder and the folders below, in torchvision's order: by the names of the folders, then of the files.

    Hidden files and folders, whose names begin with a dot, do not count, nor pipes and the like. Links are followed, but not in circles.
    UserError where a folder cannot be listed.
    """
    found = sorted(_folders(folder, frozenset()))
    return [Path(name, file) for name, files in found for file in files if Path(file).suffix.lower() in EXTENSIONS]


def _folders(folder: Path, above: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    """The folder and all below, each with the names of its files; `above` are those that hold it, which a link may lead back to."""
    real = os.path.realpath(folder)
    if real in above:
        return
    entries = _entries(folder)
    # a link that leads nowhere counts as a file, so that reading it says so
    yield str(folder), [entry.name for entry in entries if entry.is_file() or (entry.is_symlink() and not os.path.exists(entry))]
    for entry in entries:
        if entry.is_dir():
            yield from _folders(folder / entry.name, above | {real})


def _entries(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as found:
            return sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be listed: {error.strerror}") from error


class ClassFolders(Dataset[tuple[Tensor, int]]):
    """The images of folder/<class>/**, each with its class's number: classes are numbered in the order of their sorted names, as torchvision does.

    Args:
        folder: holds a folder for each class.
        read: an image file -> a tensor.

    Memory: a file's name takes the bytes that it has below `folder`, and nine more; all names lie in one piece, which processes share.
    Raises UserError where there are no class folders, or one of them has no images.
    """

    def __init__(self, folder: Path, read: Callable[[Path], Tensor]) -> None:
        self.read = read
        self.folder = folder
        self.classes = [entry.name for entry in _entries(folder) if entry.is_dir()]
        if not self.classes:
            raise UserError(f"{folder} has no class folders: it must hold a folder for each class, with that class's images")
        names, ends, self._first = bytearray(), array("q", [0]), array("q", [0])
        for name in self.classes:
            files = images_below(folder / name)
            if not files:
                raise UserError(f"the class folder {folder / name} has no images ({', '.join(EXTENSIONS)}): fill it or remove it")
            for file in files:
                names += os.fsencode(file.relative_to(folder))
                ends.append(len(names))
            self._first.append(len(ends) - 1)
        self._names, self._ends = bytes(names), ends

    def __len__(self) -> int:
        return len(self._ends) - 1

    def sample(self, index: int) -> tuple[Path, int]:
        """The file and its class's number."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be from 0 to {len(self) - 1}, got {index}")
        name = os.fsdecode(self._names[self._ends[index] : self._ends[index + 1]])
        return self.folder / name, bisect_right(self._first, index) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, number = self.sample(index)
        return self.read(file), number


def difference(names: Sequence[str], expected: Sequence[str]) -> str:
    """The names that only one of the two lists has, the first three of them."""
    odd = sorted(set(names) ^ set(expected))
    return ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
