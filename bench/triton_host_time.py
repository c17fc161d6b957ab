"""How long the host takes for a call of an operator that Triton serves: `python bench/triton_host_time.py`.

On a machine without a GPU everything is real but the CUDA driver, a stub that does nothing: what the driver itself takes for a launch
(some 2 us) is not in the figures. With a GPU the operators run on it, little work each, and the driver's time is in them.
Three ways to launch, beside the same call: by Triton's `kernel[grid]`, which binds the arguments anew; by `compiled[grid]`; and ours.
"""

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.benchmark import Timer

import interflow_kernels
from interflow_kernels.triton import registration, tiles
from interflow_kernels.triton.common import launch as launcher

STUB = Path(__file__).with_name("stub_cuda_driver.c")
OPERATORS = torch.ops.interflow_kernels


def stub_the_driver(folder: str) -> None:
    """Triton launches for sm_90 by its own launcher, into nothing; tensors of the CPU pass for a GPU's."""
    library = f"{folder}/libcuda.so.1"
    subprocess.run([os.environ.get("CC", "gcc"), "-O2", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, str(STUB)], check=True)
    ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = folder
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils
    from triton.runtime import driver

    class Stubbed(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device, self.get_current_stream = lambda: 0, lambda device: 0

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Stubbed())
    options = launcher.options
    launcher.options = lambda maker, *rest: options("cuda", *rest)
    registration.REASONS["cpu"] = None


@contextmanager
def launching(way: str) -> Iterator[None]:
    """Inside it, every launch goes that way."""
    launch = launcher._launch_by_triton
    for cache in tiles._caches:
        cache.cache_clear()
    known = launcher._is_known_version
    try:
        launcher._is_known_version = way == "ours"
        if way == "kernel[grid]":
            launcher._launch_by_triton = partial(_bound, launch)
        yield
    finally:
        launcher._is_known_version, launcher._launch_by_triton = known, launch


def _bound(launch: Callable[..., Any], *arguments: Any) -> Any:
    launcher._compiled.clear()
    return launch(*arguments)


def calls(device: str) -> dict[str, Callable[[], Any]]:
    """The raw operators on two images of 64 x 28 x 28, and a head of four stages."""
    widths, classes = (128, 256, 512, 512), 100
    new = partial(torch.randn, device=device)
    u, shift = new(2, 64, 28, 28, dtype=torch.bfloat16).to(memory_format=torch.channels_last), new(64)
    m, p, mask = OPERATORS.stage_tap(u, shift, True, True)
    maps, pooled = [new(2, w, 4, 4) for w in widths], [new(2, w) for w in widths]
    parameters = (new(classes, sum(widths)), new(4, classes), new(4, 4), new(4), "nxn")
    y, _, means = OPERATORS.interflow_head(pooled, *parameters, [1, 1], False, None)
    needs = (list(widths), [0, 1, 2, 3], True, True, True)
    head: Callable[[list[Tensor]], Any] = lambda features: OPERATORS.interflow_head.default(features, *parameters, [1, 1], False, None)  # noqa: E731
    return {
        "stage_tap, one launch": lambda: OPERATORS.stage_tap.default(u, shift, True, True),
        "stage_tap_backward, two": lambda: OPERATORS.stage_tap_backward.default(m, p, mask, u, True, True, True),
        "interflow_head of four pooled features, one": lambda: head(pooled),
        "interflow_head of four maps, two": lambda: head(maps),
        "interflow_head_backward, two": lambda: OPERATORS.interflow_head_backward.default(y, None, means, *parameters, *needs),
    }


ROUNDS, CALLS = 40, 100
WAYS = ("kernel[grid]", "compiled[grid]", "ours")


def measured(call: Callable[[], Any]) -> dict[str, list[float]]:
    """Microseconds a call of each way, a number for each round; the ways take turns."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    timer = Timer("call()", globals={"call": call})
    for _ in range(ROUNDS):
        for way in WAYS:
            with launching(way):
                found[way].append(timer.timeit(CALLS).mean * 1e6)
    return found


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        if device == "cpu":
            stub_the_driver(folder)
        where = "no GPU, driver stubbed" if device == "cpu" else torch.cuda.get_device_name()
        print(f"us a call: median, and the least of {ROUNDS} rounds; {where}, torch {torch.__version__}, triton {triton.__version__}")
        print(f"{'':44}" + "".join(f"{way:>18}" for way in WAYS))
        with interflow_kernels.backend("triton"), torch.inference_mode():
            for name, call in calls(device).items():
                row = [f"{median(each):.1f}, {min(each):.1f}" for each in measured(call).values()]
                print(f"{name:44}" + "".join(f"{cell:>18}" for cell in row))


if __name__ == "__main__":
    main()
