"""A network as a file that another program runs: each format written, and read back as a function from images to scores.

Give networks as `for_inference()` makes them: norms and attention folded. The batch is dynamic in every format, the image size is that of
the example. Images are [B, C, H, W] in fp32, prepared as the checkpoint's preprocessing says; scores are logits [B, K].

    exported      a program of torch.export: our operators in it, run by any PyTorch that has loaded the operator library
    aoti          the same compiled by AOTInductor: run from Python or C++, without Python, with the operator library
    torchscript   a trace of torch.jit: likewise, for programs that still load those
    onnx          plain ONNX operators: run by ONNX Runtime and others, without PyTorch and this package
    openvino      the same as OpenVINO's own two files, .xml and .bin
"""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .packages import require

MOST_IMAGES = 1 << 16
"""Of a batch: compilers want to know an end."""

Scores = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] -> scores [B, K]."""


@dataclass(frozen=True)
class Format:
    """write(network, images, path): images [2, C, H, W] are an example; read(path) runs what was written. needs: packages beside torch."""

    suffix: str
    write: Callable[[nn.Module, Tensor, Path], None]
    read: Callable[[Path], Scores]
    needs: tuple[str, ...] = ()


def program(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The network as a program of torch.export, with any batch of 1 to MOST_IMAGES."""
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=_dynamic_batch())


def _dynamic_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)},)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Exporters warn of their own future, of packages that they could use, and of each tensor that becomes a constant; nothing of it is for who exports."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


# --- PyTorch's own ---------------------------------------------------------------------------------------------------------
def _write_exported(network: nn.Module, images: Tensor, path: Path) -> None:
    with _without_warnings():
        torch.export.save(program(network, images), path)


def _read_exported(path: Path) -> Scores:
    module = torch.export.load(path).module()
    return lambda x: module(x)


def _write_aoti(network: nn.Module, images: Tensor, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(program(network, images), package_path=str(path))


def _read_aoti(path: Path) -> Scores:
    compiled = torch._inductor.aoti_load_package(str(path))
    return lambda x: compiled(x)


def _write_torchscript(network: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad(), _without_warnings():
        torch.jit.save(torch.jit.trace(network, images), path)


def _read_torchscript(path: Path) -> Scores:
    with _without_warnings():
        module = torch.jit.load(path)
    return lambda x: module(x)


# --- other engines' -----------------------------------------------------------------------------------------------------------
def _write_onnx(network: nn.Module, images: Tensor, path: Path) -> None:
    with torch.no_grad(), _without_warnings():
        torch.onnx.export(
            network,
            (images,),
            path,
            dynamo=True,
            input_names=["images"],
            output_names=["scores"],
            dynamic_shapes=_dynamic_batch(),
            external_data=False,
            verbose=False,
        )


def _read_onnx(path: Path) -> Scores:
    onnxruntime = require("running an ONNX file", "onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.contiguous().numpy()})[0])


def _write_openvino(network: nn.Module, images: Tensor, path: Path) -> None:
    openvino = require("the format openvino", "openvino")
    with tempfile.TemporaryDirectory() as folder:
        between = Path(folder) / "network.onnx"
        _write_onnx(network, images, between)
        openvino.save_model(openvino.convert_model(between), path, compress_to_fp16=False)


def _read_openvino(path: Path) -> Scores:
    openvino = require("running an OpenVINO file", "openvino")
    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda x: torch.from_numpy(request.infer([openvino.Tensor(x.contiguous().numpy(), shared_memory=True)])[0].copy())


FORMATS: dict[str, Format] = {
    "exported": Format(".pt2", _write_exported, _read_exported),
    "aoti": Format(".aoti.pt2", _write_aoti, _read_aoti),
    "torchscript": Format(".ts", _write_torchscript, _read_torchscript),
    "onnx": Format(".onnx", _write_onnx, _read_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(".xml", _write_openvino, _read_openvino, ("openvino", "onnx", "onnxscript")),
}


def write(name: str, network: nn.Module, images: Tensor, path: Path) -> None:
    """Writes the network in a format; MissingPackageError where it needs a package that is not there."""
    if FORMATS[name].needs:
        require(f"the format {name}", *FORMATS[name].needs)
    FORMATS[name].write(network, images, path)


def read(name: str, path: Path) -> Scores:
    """What was written, as a function that runs it on the CPU."""
    return FORMATS[name].read(path)
