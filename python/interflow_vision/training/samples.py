"""The small trained network and the ten images that come with the package, to try `interflow predict` and `for_inference` at once."""

from pathlib import Path

from ..errors import UserError

NAME = "sample"
"""What --ckpt calls it."""

FOLDER = Path(__file__).resolve().parent.parent / "samples"
CHECKPOINT = FOLDER / "fashion_mnist.ckpt"
IMAGES = FOLDER / "images"

LIMIT = 4_000_000
"""Bytes that the checkpoint may have."""


def checkpoint() -> Path:
    """The checkpoint's file; UserError where this installation has none."""
    if not CHECKPOINT.is_file():
        raise UserError(f"this installation has no sample checkpoint {CHECKPOINT}: train one with `interflow fit`, and give --ckpt best")
    return CHECKPOINT
