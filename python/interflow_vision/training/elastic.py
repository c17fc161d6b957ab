"""A run whose worker was killed goes on by itself: what `torchrun --max-restarts` starts again takes the last checkpoint."""

import os
from pathlib import Path

from . import runs


def was_restarted() -> bool:
    """Whether torchrun has started this process in place of one that ended."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") not in ("", "0")


def checkpoint(root: Path) -> Path | None:
    """The last checkpoint of the run that torchrun started before, which is the newest below `root`; None where it had none yet.

    Only the newest run counts: an older one is another training.
    """
    newest = runs.newest(root) if was_restarted() else None
    path = None if newest is None else newest / "checkpoints" / "last.ckpt"
    return path if path is not None and path.is_file() else None
