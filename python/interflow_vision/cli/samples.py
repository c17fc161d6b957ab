"""`python -m interflow_vision.cli.samples RUN`: makes of a run the small checkpoint that the package ships, and writes the ten sample images."""

import argparse
import sys
from pathlib import Path

import torch

from ..data.known import FashionMNIST
from ..errors import UserError
from ..reports import curves
from ..training import checkpoints, runs, samples
from ..training.checkpoint_io import SafeCheckpointIO
from ..training.classifier import CHECKPOINT_KEY

KEPT = ("pytorch-lightning_version", "epoch", "global_step", "state_dict", "hyper_parameters", "datamodule_hyper_parameters", CHECKPOINT_KEY)
"""Of a checkpoint what a prediction needs; not the optimiser's state."""


def shrink(source: Path, target: Path) -> None:
    """Writes of a checkpoint what a prediction needs; UserError where that is more than the package may ship."""
    content = checkpoints.read(source)
    SafeCheckpointIO().save_checkpoint({key: content[key] for key in KEPT if key in content}, target)
    if target.stat().st_size > samples.LIMIT:
        size = target.stat().st_size
        target.unlink()
        raise UserError(f"the checkpoint of {source} has {size} bytes, more than the {samples.LIMIT} that are shipped: train with a smaller --model.width")


def write_images(data: FashionMNIST, folder: Path) -> list[Path]:
    """The first test image of each class as a PNG file that bears the class's name."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    images, target = data.read()[1]
    written = []
    for number, name in enumerate(data.class_names):
        written.append(folder / f"{name.partition('/')[0].replace(' ', '_')}.png")
        first = int((target == number).nonzero()[0])
        Image.fromarray(images[first, 0].numpy()).save(written[-1], optimize=True)
    return written


def readme(run: Path, path: Path) -> str:
    """How the checkpoint was made."""
    log = curves.read_log(run)
    accuracy = f"{list(log['test/accuracy'].values())[-1]:.2%}" if "test/accuracy" in log else "not measured"
    epochs, size = len(log.get("train/loss", {})), path.stat().st_size
    return f"""# What is here, and how it was made

- `fashion_mnist.ckpt` ({size:,} bytes): a quarter-width VGG-16-BN with Interflow, trained on Fashion-MNIST for {epochs} epochs with torch
  {torch.__version__}. Accuracy on the 10,000 test images: {accuracy}.
- `images/`: the first test image of each class. Fashion-MNIST is Zalando's, under the MIT licence (arXiv 1708.07747).

Made by

    interflow fit --config configs/fashion_mnist_small.yaml
    python -m interflow_vision.cli.samples RUN

where RUN is the folder of that run. To try it: `interflow predict --ckpt sample`.
"""


def main() -> int:
    """The command; returns 0, or 2 after one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m interflow_vision.cli.samples", description="Writes the package's sample checkpoint and images.")
    parser.add_argument("run", type=Path, metavar="RUN", nargs="?", help="the folder of a run; without it only the images are written")
    parser.add_argument("--data-root", default="/usr/share/datasets/fashion-mnist", help="Fashion-MNIST's files (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=samples.FOLDER, help="default: %(default)s")
    given = parser.parse_args()
    try:
        write_images(FashionMNIST(given.data_root), given.out / samples.IMAGES.name)
        if given.run is not None:
            target = given.out / samples.CHECKPOINT.name
            shrink(runs.checkpoint(str(given.run)), target)
            (given.out / "README.md").write_text(readme(given.run, target))
    except UserError as error:
        print(f"samples: {error}", file=sys.stderr)
        return 2
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
