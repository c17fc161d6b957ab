"""`interflow predict`: the class and its probability for image files."""

import argparse
import glob
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from ..data.folders import images_below
from ..data.images import Preprocessing
from ..errors import UserError, one_line
from ..serving.engines import ENGINES, engine
from ..training import checkpoints, runs, samples
from .predictions import FORMATS, Progress, Writer

BATCH = 64
"""Images classified at once."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        """UserError."""
        raise UserError(f"{message}; see `{self.prog} --help`")


def parser() -> Parser:
    """Of the subcommand's arguments."""
    made = Parser(
        "interflow predict",
        description="Classifies image files: prints file, class and probability, separated by tabs. A file that cannot be read gets one line on "
        "stderr and the others are classified all the same. Exit code: 0 all classified, 1 some were not, 2 none.",
        epilog="How images of every kind are read (orientation, 16 bits, transparency): interflow_vision/data/decoding.py.",
    )
    made.add_argument(
        "--ckpt",
        required=True,
        metavar="CKPT",
        help="best or last (of the newest run that has one), the folder of a run, a checkpoint file, or sample: a small network for Fashion-MNIST",
    )
    made.add_argument("--root", type=Path, default=runs.ROOT, metavar="FOLDER", help="where the runs lie, for best and last (default: %(default)s)")
    made.add_argument("--top-k", type=_positive, default=1, metavar="K", help="so many classes of each image, the most probable first (default: %(default)s)")
    made.add_argument("--format", choices=FORMATS, default="tsv", help="tabs, a table with a head, or a JSON object a line (default: %(default)s)")
    made.add_argument("--batch-size", type=_positive, default=BATCH, metavar="B", help="images that are classified at once (default: %(default)s)")
    made.add_argument(
        "--device", help=f"default: {'cuda' if torch.cuda.is_available() else 'cpu'}; for --engine onnxruntime and openvino cpu, which they run on"
    )
    made.add_argument("--engine", default="torch", choices=list(ENGINES), help="what runs the network (default: %(default)s); the others must be installed")
    made.add_argument("--compile", action="store_true", help="run the network through torch.compile: worth it for many images")
    made.add_argument(
        "files",
        nargs="*",
        metavar="FILES",
        help="images of any format that Pillow reads; folders, of which all images count, those in folders below too; patterns like 'shots/*.png'; "
        "pipes; - for an image on standard input; with --ckpt sample default the ten images that come with the package",
    )
    return made


def main(argv: Sequence[str]) -> int:
    """Prints a line for each image, and one on stderr for each that cannot be read; the exit code is 1 where some, 2 where all cannot."""
    given = parser().parse_args(argv)
    if not given.files and given.ckpt != samples.NAME:
        raise UserError("the following arguments are required: FILES; see `interflow predict --help`")
    path = runs.checkpoint(given.ckpt, given.root)
    classifier = checkpoints.load(path)
    rule = classifier.preprocessing
    if rule is None:
        raise UserError(
            f"{path} does not say how its images were prepared: its data module had no attribute `preprocessing`, so no file can be classified with it"
        )
    device = usable_device(given.device or ("cuda" if given.engine == "torch" and torch.cuda.is_available() else "cpu"))
    if given.engine != "torch" and device.type != "cpu":
        raise UserError(f"--engine {given.engine} runs on the CPU here, got --device {given.device}; leave one of the two out")
    if given.engine != "torch" and given.compile:
        raise UserError(f"--compile is for --engine torch, got --engine {given.engine}; leave one of the two out")
    network = classifier.model.for_inference().to(device)
    if given.compile:
        network.compile()
    scores_of = engine(given.engine, network, torch.zeros(2, rule.channels, rule.size, rule.size))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files are bytes, which need not be text
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")
    good = bad = 0
    readable, writer, progress = _read(_named(given.files or [str(samples.IMAGES)]), rule), Writer(given.format), Progress()
    while batch := list(itertools.islice(readable, given.batch_size)):
        images = [(name, image) for name, image in batch if isinstance(image, Tensor)]
        scores = probabilities(scores_of, torch.stack([image for _, image in images]).to(device), given.top_k) if images else iter(())
        for name, found in batch:
            result = next(scores) if isinstance(found, Tensor) else found
            if isinstance(result, UserError):
                bad += 1
                print(f"interflow: {result}", file=sys.stderr)
                continue
            if any(probability != probability for _, probability in result):
                bad += 1
                print(f"interflow: the scores of {name} are not finite numbers: the weights of {path} cannot be used for it", file=sys.stderr)
                continue
            good += 1
            writer.write(name, [(classifier.class_names[label] if classifier.class_names else str(label), p) for label, p in result])
        writer.flush()
        progress.add(len(batch))
    progress.close()
    return 0 if not bad else 1 if good else 2


def usable_device(name: str) -> torch.device:
    """The device of that name; UserError where there is none here that can hold numbers."""
    try:
        device = torch.device(name)
        torch.ones(1, device=device).sum().item()
    except Exception as error:  # by device, what is missing shows as RuntimeError, AssertionError, ImportError, NotImplementedError
        raise UserError(f"--device {name} is not available here: {one_line(error).partition('. ')[0]}") from error
    return device


def probabilities(scores_of: Callable[[Tensor], Tensor], images: Tensor, most: int = 1) -> Iterator[list[tuple[int, float]]]:
    """[B, C, size, size] -> the `most` best classes of each image with their probabilities; NaN where a score is not finite."""
    with torch.inference_mode():
        scores = scores_of(images).float()
        probability, label = scores.softmax(1).topk(min(most, scores.shape[1]))
        probability[~scores.isfinite().all(1)] = torch.nan
    for labels, values in zip(label.tolist(), probability.tolist(), strict=True):
        yield list(zip(labels, values, strict=True))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


_positive.__name__ = "whole number"  # as argparse calls it


def _named(arguments: Iterable[str]) -> Iterator[str | UserError]:
    """The image files that arguments name: files as they are, those in folders, and what patterns stand for."""
    for argument in arguments:
        if os.path.isdir(argument):
            yield from _below(Path(argument))
        elif not os.path.exists(argument) and glob.has_magic(argument):
            matches = sorted(glob.glob(argument, recursive=True))
            for match in matches:
                yield from _below(Path(match)) if os.path.isdir(match) else (match,)
            if not matches:
                yield UserError(f"no file matches {argument}")
        else:
            yield argument


def _below(folder: Path) -> Iterator[str | UserError]:
    try:
        files = images_below(folder)
    except UserError as error:
        yield error
        return
    yield from map(str, files)
    if not files:
        yield UserError(f"the folder {folder} has no images")


def _read(names: Iterable[str | UserError], rule: Preprocessing) -> Iterator[tuple[str, Tensor | UserError]]:
    """Each name with its image [C, size, size], or with what is wrong with it."""
    for name in names:
        if isinstance(name, UserError):
            yield "", name
            continue
        try:
            yield name, rule.read(name)
        except UserError as error:
            yield name, error
