"""Checkpoint files that survive kills, full disks and flipped bits: how they are written, checked and cleaned up.

A checkpoint is a zip file, whose every record has a checksum (CRC-32) that torch.save writes. torch.load does not compare
them; `is_whole` does. So the checksum needs no second file, and a renamed, copied or older checkpoint has one too.
"""

import contextlib
import errno
import fcntl
import os
import time
import zipfile
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from ..errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_STALE = 60.0
"""Seconds after which a partial file that nobody has locked is left over from a process that was killed."""


def before(path: Path) -> Path:
    """Where the checkpoint lies that `path` has replaced."""
    return path.with_name(f"{path.name}.before")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, in full and onto the disk, before it takes the target's place; keeps the one before.

    At every moment the target is a whole checkpoint, the old or the new one. The one that was replaced stays as
    `NAME.before` until the next one comes, or until its space is needed. UserError where nothing can be written.
    Remote folders are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Writes `checkpoint` to `path`."""
        if storage_options is not None or "://" in str(path) or Path(path).is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                _write(checkpoint, _partial(path))
            except OSError as error:
                if error.errno not in _FULL or not before(path).exists():
                    raise
                before(path).unlink()
                _write(checkpoint, _partial(path))
            _keep(path)
            os.replace(_partial(path), path)
            _sync(path.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                _partial(path).unlink(missing_ok=True)
            raise UserError(_refusal(path, error)) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint; UserError where it is damaged. Tensors and plain values only, unless `weights_only` is False."""
        if "://" not in str(path) and Path(path).is_file() and not is_whole(Path(path)):
            raise UserError(damaged(Path(path)))
        # Lightning's own default for a checkpoint at a URL is to execute whatever it holds.
        return super().load_checkpoint(path, map_location, True if weights_only is None else weights_only)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint and the one before it."""
        super().remove_checkpoint(path)
        if "://" not in str(path):
            before(Path(path)).unlink(missing_ok=True)


class _Stream:
    """A file for torch.save that remembers why a write failed, which torch does not always pass on."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes the file in full and onto the disk; its lock says that somebody is at it."""
    with path.open("wb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        stream = _Stream(file)
        try:
            torch.save(checkpoint, stream)  # type: ignore[arg-type]
        except Exception:
            if stream.error is not None:
                raise stream.error from None
            raise
        file.flush()
        os.fsync(file.fileno())


def _keep(path: Path) -> None:
    """Gives the checkpoint that is about to be replaced a second name, where the file system has hard links."""
    if path.is_file() and not path.is_symlink():
        before(path).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.link(path, before(path))


def _sync(folder: Path) -> None:
    """Makes the new name last beyond a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(handle)
    finally:
        os.close(handle)


def _refusal(path: Path, error: OSError) -> str:
    cause = f"the checkpoint {path} cannot be written ({error.strerror})"
    if not path.is_file():
        return f"{cause}: make room or choose another folder with --trainer.default_root_dir"
    return f"{cause}, but the one from before is whole: make room and go on with `interflow fit --ckpt_path {path}`"


def is_whole(path: Path) -> bool:
    """Whether every byte of a checkpoint that counts is as it was written, by the checksums in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # what zipfile raises depends on the place of the damage
        return False


def damaged(path: Path) -> str:
    """The sentence about a damaged checkpoint; it names the newest whole one in the same folder."""
    others = [*path.parent.glob("*.ckpt"), *path.parent.glob("*.ckpt.before")]
    for other in sorted(others, key=lambda p: p.stat().st_mtime, reverse=True):
        if other != path and is_whole(other):
            return f"{path} is damaged or not a checkpoint: it cannot be read; {other} is whole, take that one"
    return f"{path} is damaged or not a checkpoint: it cannot be read"


def remove_leftovers(folder: Path) -> None:
    """Removes what a process that was killed while saving has left in `folder`, unless somebody is still writing it."""
    for partial in folder.glob(".*.partial"):
        with contextlib.suppress(OSError), partial.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - partial.stat().st_mtime > _STALE:
                partial.unlink()
