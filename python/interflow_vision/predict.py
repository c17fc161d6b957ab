"""`interflow predict`: the class and its probability for image files."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from . import checkpoints, runs
from .errors import UserError

BATCH = 64
"""Images classified at once."""


def main(argv: Sequence[str]) -> None:
    """Prints a line `file class probability`, separated by tabs, for each file; UserError where one cannot be read."""
    parser = argparse.ArgumentParser("interflow predict", description="Classifies image files: prints file, class and probability, separated by tabs.")
    parser.add_argument(
        "--ckpt", required=True, metavar="CKPT", help="best or last (of the newest run that has one), the folder of a run, or a checkpoint file"
    )
    parser.add_argument("--root", type=Path, default=runs.ROOT, metavar="FOLDER", help="where the runs lie, for best and last (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    parser.add_argument("files", nargs="+", metavar="FILES", help="image files of any format that Pillow reads")
    given = parser.parse_args(argv)
    path = runs.checkpoint(given.ckpt, given.root)
    classifier = checkpoints.load(path)
    rule = classifier.preprocessing
    if rule is None:
        raise UserError(f"{path} does not say how its images were prepared, so no image can be classified with it")
    try:
        classifier.to(given.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {given.device} is not available here") from error
    for start in range(0, len(given.files), BATCH):
        files = given.files[start : start + BATCH]
        images = torch.stack([rule.read(file) for file in files])
        with torch.inference_mode():
            probability, label = classifier(images.to(given.device)).float().softmax(1).max(1)
        for file, p, k in zip(files, probability.tolist(), label.tolist(), strict=True):
            print(f"{file}\t{classifier.class_names[k] if classifier.class_names else k}\t{p:.4f}")
