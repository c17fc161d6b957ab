"""Whole-network inference on a CPU, our way beside every engine, in one run: `PYTHONPATH=bench python bench/serving.py`.

    for_inference      ours, as the package serves: norms and attention folded, taps at the stages' ends, channels_last
    packed             the same with each convolution's weight packed in oneDNN's layout and its ReLU a post-operation: a trial, nothing of the package
    compiled           for_inference behind torch.compile with freezing
    package            for_inference as an AOTInductor package (interflow export --format aoti)
    ONNX Runtime, OpenVINO   the same network, exported as `interflow predict --engine` does
    plain VGG-16       the network without Interflow, in eager PyTorch

Results are compared before anything is timed. Providers take turns, a round each; the table has the median of each, and its ratio to the
best of the engines with a 95 % interval over rounds. A machine that is not quiet gives ratios that mean nothing: see `others` in the output.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness.clock import call_turn, rotation
from harness.machine import cpu_name, others_seconds, wait_for_quiet
from harness.stats import median_interval, ratio_interval
from torch import Tensor, nn

from interflow_kernels import stage_tap
from interflow_vision import VGG, create_model
from interflow_vision.serving import formats
from interflow_vision.serving.engines import engine, largest_difference

CELLS = ((224, 1), (224, 8), (32, 64))
"""Pixels and batch."""
ENGINES = ("compiled", "package", "ONNX Runtime", "OpenVINO")
"""What for_inference is compared with."""
Call = Callable[[Tensor], Tensor]


def packed(network: VGG) -> Call:
    """Convolutions by torch.ops.mkldnn, as Inductor's freezing calls them; taps and head as they are.

    A tap's convolution keeps its bias for the tap. Shapes are those of the first call.
    """
    operators = torch.ops.mkldnn
    steps: list[Any] = []

    def prepare(x: Tensor) -> None:
        layers = network.features.placed()
        for (_, place, layer), (_, following, _) in zip(layers, [*layers[1:], layers[-1]], strict=True):
            if place.role == "convolution":
                assert isinstance(layer, nn.Conv2d)
                relu = following.role == "relu"
                shape = (layer.padding, layer.stride, layer.dilation, layer.groups)
                weight = operators._reorder_convolution_weight(layer.weight, *map(list, shape[:3]), layer.groups, list(x.shape))
                steps.append((weight, layer.bias if relu else None, shape, "relu" if relu else "none", None if relu else (layer.bias, place, following)))
                x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
                x = F.relu(x)
                if following.role == "end" and following.max_pool:
                    x = F.max_pool2d(x, 2, 2)

    def call(x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        if not steps:
            prepare(x)
        features = []
        for weight, bias, (padding, stride, dilation, groups), post, tap in steps:
            x = operators._convolution_pointwise(x, weight, bias, padding, stride, dilation, groups, post, [], "")
            if tap is not None:
                m, p = stage_tap(x, tap[0], max_pool=tap[2].max_pool)
                if tap[2].feature:
                    features.append(p)
                x = m if m is not None else x
        return network.head(features)

    return call


def compiled(network: nn.Module) -> Call:
    from torch._inductor import config

    torch.compiler.reset()
    made = torch.compile(network, dynamic=False)

    def call(x: Tensor) -> Tensor:
        with config.patch(freezing=True):
            return made(x)

    return call


def package(network: nn.Module, x: Tensor, folder: Path) -> Call:
    path = folder / f"network{len(list(folder.iterdir()))}.aoti.pt2"
    formats.write("aoti", network, x, path)
    return formats.read("aoti", path)


def providers(model: str, pixels: int, batch: int, folder: Path, chosen: set[str]) -> tuple[dict[str, Call], dict[str, str], list[Tensor]]:
    """Those that run here, why others do not, and sets of images."""
    torch.manual_seed(0)
    trained = create_model(model).eval()
    network = trained.for_inference()
    plain = create_model(model, head="last", stage="eager").eval()
    plain = plain.for_inference() if model.endswith("_bn") else plain.to(memory_format=torch.channels_last)
    images = [torch.randn(batch, 3, pixels, pixels).to(memory_format=torch.channels_last) for _ in range(3)]
    example = torch.randn(2, 3, pixels, pixels)
    makers: dict[str, Callable[[], Call]] = {
        "for_inference": lambda: network,
        "packed": lambda: packed(network),
        "compiled": lambda: compiled(network),
        "package": lambda: package(network, example, folder),
        "ONNX Runtime": lambda: engine("onnxruntime", network, example),
        "OpenVINO": lambda: engine("openvino", network, example),
        "plain VGG-16": lambda: plain,
    }
    made, missing = {}, {}
    with torch.inference_mode():
        expected = trained(images[0])
        for name, maker in makers.items():
            if name not in chosen and chosen:
                continue
            try:
                call = maker()
                difference = 0.0 if name == "plain VGG-16" else largest_difference(call(images[0]), expected)
                call(images[0])
            except Exception as error:
                missing[name] = str(error).splitlines()[0]
                continue
            if difference > 1e-3:
                raise SystemExit(f"{name} gives other scores: they differ by {difference:.1e} of the largest one")
            made[name] = call
    return made, missing, images


def measure(calls: dict[str, Call], images: list[Tensor], rounds: int) -> tuple[dict[str, list[float]], float | None]:
    """Seconds a call, one sample for each provider and round; and the CPU seconds that other processes took meanwhile."""
    turns = rotation(len(images))
    before = others_seconds()
    with torch.inference_mode():
        timed = {name: call_turn(lambda i, call=call: call(images[i]), turns, torch.device("cpu")) for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in timed}
        names = list(timed)
        for number in range(rounds):
            for name in names[number % len(names) :] + names[: number % len(names)]:
                samples[name].append(timed[name]())
    after = others_seconds()
    return samples, None if before is None or after is None else after - before


def table(samples: dict[str, list[float]]) -> list[str]:
    """Median with interval in ms; speed beside the best engine (above 1 is faster than it)."""
    engines = [name for name in ENGINES if name in samples]
    best = min(engines, key=lambda name: median_interval(samples[name])[0]) if engines else None
    lines = [f"| | ms | speed beside {best or 'nothing'} |", "|---|---|---|"]
    for name, seconds in samples.items():
        middle, low, high = (1e3 * value for value in median_interval(seconds))
        ratio = "" if best is None else "{:.3f} ({:.3f} to {:.3f})".format(*ratio_interval(samples[best], seconds))
        lines.append(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {ratio} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=["vgg16", "vgg16_bn"])
    parser.add_argument("--cells", nargs="+", default=[f"{pixels}x{batch}" for pixels, batch in CELLS], metavar="PIXELSxBATCH")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--only", nargs="+", default=[], metavar="PROVIDER")
    parser.add_argument("--out", type=Path, help="every sample, as JSON")
    given = parser.parse_args()
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, waited {wait_for_quiet(60):.0f} s for a quiet machine")
    results = []
    for model in given.models:
        for cell in given.cells:
            pixels, batch = map(int, cell.split("x"))
            with tempfile.TemporaryDirectory() as folder:
                calls, missing, images = providers(model, pixels, batch, Path(folder), set(given.only))
                samples, others = measure(calls, images, given.rounds)
            print(f"\n{model}, {pixels} px, B = {batch}, fp32; others took {'?' if others is None else f'{others:.1f}'} CPU s")
            print("\n".join(table(samples)))
            for name, why in missing.items():
                print(f"not {name}: {why}")
            results.append({"model": model, "pixels": pixels, "batch": batch, "others": others, "samples": samples, "missing": missing})
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
