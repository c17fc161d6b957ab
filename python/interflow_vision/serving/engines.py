"""Which engine runs a network: PyTorch with our operators, ONNX Runtime or OpenVINO."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from . import formats

ENGINES: dict[str, str | None] = {"torch": None, "onnxruntime": "onnx", "openvino": "openvino"}
"""By name: the format in which the engine takes a network."""


def engine(name: str, network: nn.Module, images: Tensor) -> formats.Scores:
    """The network, as for_inference() makes it, as a function from images [B, C, H, W] to scores [B, K], run by the engine `name`.

    images [2, C, H, W]: an example of the size. All but "torch" run on the CPU, with as many threads as PyTorch has.
    Raises MissingPackageError where the engine, or what exports for it, is not installed.
    """
    form = ENGINES[name]
    if form is None:
        return lambda x: network(x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"network{formats.FORMATS[form].suffix}"
        formats.write(form, network, images, path)
        scores = formats.read(form, path)
        scores(images[:1])  # what is read late is read while the file is there
    return scores


def largest_difference(scores: Tensor, expected: Tensor) -> float:
    """max |scores - expected| / max |expected|; infinite where a score is not finite and the expected one is."""
    difference = (scores.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float("inf") if difference != difference else float(difference)
