"""CIFAR-10 and CIFAR-100 as they are distributed: the pickled form, of which nothing is executed, and the binary one; folders or archives.

Source of both formats: cs.toronto.edu/~kriz/cifar.html. A row is 3072 bytes, 1024 for red, green and blue each, in rows of 32 pixels.
"""

import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, one_line

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Where the parts lie in one of the forms: the folder in the archive, the archive, the files of the parts, and that of the names."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str


PICKLED = {
    10: Layout("cifar-10-batches-py", "cifar-10-python.tar.gz", tuple(f"data_batch_{i}" for i in range(1, 6)), ("test_batch",), "batches.meta"),
    100: Layout("cifar-100-python", "cifar-100-python.tar.gz", ("train",), ("test",), "meta"),
}
BINARY = {
    10: Layout("cifar-10-batches-bin", "cifar-10-binary.tar.gz", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), ("test_batch.bin",), "batches.meta.txt"),
    100: Layout("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin",), ("test.bin",), "fine_label_names.txt"),
}
"""By the number of classes."""

Part = tuple[Tensor, Tensor]
"""Images [N, 3, 32, 32], uint8, and labels [N], int64."""


def read(root: Path, classes: int) -> tuple[Part, Part, tuple[str, ...]]:
    """Training images, test images and the names of the classes, from the form that lies in `root`; UserError where none does or it is damaged."""
    for layout, parse, parse_names in ((PICKLED[classes], _pickled_rows, _pickled_names), (BINARY[classes], _binary_rows, _binary_names)):
        open_file = _opener(root, layout)
        if open_file is not None:
            return (
                _part(layout.train, open_file, parse, classes),
                _part(layout.test, open_file, parse, classes),
                parse_names(open_file(layout.names), layout.names, classes),
            )
    searched = [name for layout in (PICKLED[classes], BINARY[classes]) for name in (layout.folder, layout.archive)]
    raise UserError(f"there is no CIFAR-{classes} in {root}: it must hold one of {', '.join(searched)}; --data.download true fetches it")


def is_in(root: Path, classes: int) -> bool:
    """Whether one of the forms lies in `root`."""
    for layout in (PICKLED[classes], BINARY[classes]):
        if (root / layout.archive).is_file() or any((folder / layout.train[0]).is_file() for folder in (root / layout.folder, root)):
            return True
    return False


def _opener(root: Path, layout: Layout) -> Callable[[str], bytes] | None:
    """A function that gives a file's content by its name; None where this form does not lie in `root`."""
    for folder in (root / layout.folder, root):
        if (folder / layout.train[0]).is_file():
            return lambda name: _content(folder / name)
    archive = root / layout.archive
    if not archive.is_file():
        return None
    members = _members(archive)

    def from_archive(name: str) -> bytes:
        if name not in members:
            raise UserError(f"{archive} has no file {name}: it is damaged or something else")
        return members[name]

    return from_archive


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _members(archive: Path) -> Mapping[str, bytes]:
    """The files of an archive by their names without folders; nothing is written."""
    try:
        with tarfile.open(archive) as tar:
            return {Path(member.name).name: file.read() for member in tar if member.isfile() and (file := tar.extractfile(member)) is not None}
    except Exception as error:  # tarfile, gzip and zlib errors, by what is damaged
        raise UserError(f"{archive} is damaged: {one_line(error)}") from error


Rows = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _part(files: tuple[str, ...], open_file: Callable[[str], bytes], parse: Callable[[bytes, str, int], Rows], classes: int) -> Part:
    rows, labels = zip(*(parse(open_file(name), name, classes) for name in files), strict=True)
    target = torch.from_numpy(np.concatenate(labels).astype(np.int64))
    if len(target) and not (target.min() >= 0 and target.max() < classes):
        raise UserError(f"CIFAR-{classes} has labels from {target.min()} to {target.max()}, they must be below {classes}: {files[0]} is another data set's")
    return torch.from_numpy(np.concatenate(rows)).view(-1, 3, 32, 32), target


def _binary_rows(content: bytes, name: str, classes: int) -> Rows:
    """Rows of one label (CIFAR-100: coarse and fine), then the pixels."""
    labels = 1 if classes == 10 else 2
    if len(content) % (labels + PIXELS):
        raise UserError(f"{name} is damaged: its {len(content)} bytes are not rows of {labels + PIXELS}")
    rows = np.frombuffer(bytearray(content), dtype=np.uint8).reshape(-1, labels + PIXELS)
    return rows[:, labels:], rows[:, labels - 1]


def _binary_names(content: bytes, name: str, classes: int) -> tuple[str, ...]:
    return _checked_names(content.decode("utf-8", "replace").split(), name, classes)


def _pickled_rows(content: bytes, name: str, classes: int) -> Rows:
    found = unpickled(content, name)
    rows, labels = found.get("data"), found.get("labels" if classes == 10 else "fine_labels")
    rows = rows if isinstance(rows, np.ndarray) and rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1] == PIXELS else None
    if rows is None or not isinstance(labels, list) or len(labels) != len(rows) or not all(isinstance(label, int) for label in labels):
        raise UserError(f"{name} is not a batch of CIFAR-{classes}: it must hold rows of {PIXELS} bytes and a label for each")
    return rows, np.array(labels, dtype=np.int64)


def _pickled_names(content: bytes, name: str, classes: int) -> tuple[str, ...]:
    found = unpickled(content, name).get("label_names" if classes == 10 else "fine_label_names") or []
    return _checked_names([label.decode("utf-8", "replace") if isinstance(label, bytes) else label for label in found], name, classes)


def _checked_names(names: list[Any], file: str, classes: int) -> tuple[str, ...]:
    if len(names) != classes or not all(isinstance(label, str) for label in names):
        raise UserError(f"{file} must hold {classes} names of classes, it has {len(names)}")
    return tuple(names)


class _Unpickler(pickle.Unpickler):
    """Builds numbers, texts, lists, dictionaries and arrays; any other name in the file is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")):
            return _empty_array
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return _dtype
        if (module, name) == ("_codecs", "encode"):  # bytes in files that Python 3 wrote for Python 2
            return _encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a data set does not need")


def _empty_array(*_: Any) -> Any:
    """What NumPy's _reconstruct makes; the pickle then gives it shape, type and bytes."""
    return np.ndarray((0,), dtype=np.uint8)


def _dtype(code: Any, *_: Any) -> np.dtype[Any]:
    code = code.decode() if isinstance(code, bytes) else code
    if code not in ("u1", "|u1"):
        raise pickle.UnpicklingError(f"it has an array of type {code!r}, not of bytes")
    return np.dtype(np.uint8)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the encoding {encoding!r}")
    return text.encode("latin1")


def unpickled(content: bytes, name: str) -> dict[str, Any]:
    """The dictionary in a pickle of CIFAR, by texts; UserError where it is damaged or names anything but arrays of bytes."""
    try:
        found = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # by what is damaged, pickle and NumPy raise almost anything
        raise UserError(f"{name} is not a pickle of CIFAR: {one_line(error)}") from error
    if not isinstance(found, dict):
        raise UserError(f"{name} is not a pickle of CIFAR: it holds a {type(found).__name__}, not a dictionary")
    return {key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key): value for key, value in found.items()}
