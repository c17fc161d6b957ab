"""`interflow export`: a checkpoint as a file for another program, read back and compared before it counts."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..serving import formats
from ..serving.engines import largest_difference
from ..training import checkpoints, runs
from .predict import Parser

ALLOWED = 1e-3
"""Of the largest score: what rounding may change, since folding a norm or the attention rounds weights anew."""


def parser() -> argparse.ArgumentParser:
    """Of the subcommand's arguments."""
    made = Parser(
        "interflow export",
        description="Writes a checkpoint's network, folded and fused, as a file for another program; reads it back and compares its scores with the "
        "checkpoint's. Beside it NAME.json says how images are prepared and what the classes are called.",
        epilog="exported, aoti and torchscript hold our operators: load the library that interflow_kernels.library_path() names, "
        "torch.ops.load_library(PATH), and torch alone runs them. onnx and openvino hold none.",
    )
    made.add_argument("ckpt", metavar="CKPT", help="best or last (of the newest run that has one), the folder of a run, or a checkpoint file")
    made.add_argument("--format", required=True, choices=list(formats.FORMATS), help="what is written")
    made.add_argument("--out", type=Path, metavar="FILE", help="default: beside the checkpoint, with its name")
    made.add_argument("--root", type=Path, default=runs.ROOT, metavar="FOLDER", help="where the runs lie, for best and last (default: %(default)s)")
    return made


def main(argv: Sequence[str]) -> int:
    """Writes the file, compares, prints a line. UserError where it cannot, or where the file gives other scores."""
    given = parser().parse_args(argv)
    form = formats.FORMATS[given.format]
    checkpoint = runs.checkpoint(given.ckpt, given.root)
    out: Path = given.out or checkpoint.with_name(checkpoint.name.removesuffix(".ckpt") + form.suffix)
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent}: make it, or choose another file with --out")
    if given.format == "openvino" and out.suffix != ".xml":
        raise UserError(f"--out must end in .xml for the format openvino, which puts the weights into a file .bin beside it, got {out}")
    classifier = checkpoints.load(checkpoint)
    rule = classifier.preprocessing
    if rule is None:
        raise UserError(f"{checkpoint} does not say how its images were prepared, so their size is not known: its data module had no attribute `preprocessing`")
    network = classifier.model.for_inference()
    images = torch.randn(2, rule.channels, rule.size, rule.size, generator=torch.Generator().manual_seed(0))
    formats.write(given.format, network, images, out)
    scores, worst = formats.read(given.format, out), 0.0
    with torch.no_grad():
        for batch in (1, 2, 5):
            x = torch.randn(batch, *images.shape[1:], generator=torch.Generator().manual_seed(batch))
            worst = max(worst, largest_difference(scores(x), classifier(x)))
    if worst > ALLOWED:
        raise UserError(f"{out} gives other scores than {checkpoint}: they differ by {worst:.1e} of the largest one, more than {ALLOWED:.0e}; do not use it")
    about = {
        "format": given.format,
        "images": ["B", rule.channels, rule.size, rule.size],
        "scores": ["B", classifier.model.num_classes],
        "preprocessing": rule.as_dict(),
        "class_names": list(classifier.class_names),
        "torch": torch.__version__,
    }
    out.with_name(f"{out.name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{out}: images {_shape(about['images'])} -> scores {_shape(about['scores'])}, within {worst:.1e} of the checkpoint's")
    return 0


def _shape(sizes: object) -> str:
    assert isinstance(sizes, list)
    return f"[{', '.join(map(str, sizes))}]"
