"""The CUDA library as tests build it, once in a run, for every architecture; its kernels as the compiler made them. Fixtures to import."""

import functools
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_batches import BATCHES
from cuda_code import ARCHITECTURES, Kernel, disassembler, kernels_of

ROOT = Path(__file__).parent.parent
KERNEL_FILES = sorted(ROOT.glob("csrc/*/cuda/*.cu"))


sys.path.insert(0, str(ROOT))
import cuda_build  # noqa: E402

TOOLKIT = cuda_build.find_toolkit()
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason="no nvcc in CUDA_HOME, PATH or /usr/local/cuda")


@dataclass(frozen=True)
class Built:
    library: Path
    folder: Path  # FILE.o and FILE.log of each .cu
    seconds: float


BUILD = """
import runpy, sys
made = runpy.run_path("setup.py")
parts = made["extensions"]()
parts["ext_modules"] = [e for e in parts["ext_modules"] if e.name == "interflow_kernels._cuda"]
made["setup"](script_args=["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[2]], **parts)
"""


@functools.cache
def build() -> Built:
    """The CUDA library for every architecture, built as an installation builds it, in build/; what is up to date there stays."""
    folder = ROOT / "build" / "cuda-test"
    environment = {**os.environ, "INTERFLOW_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"CUDA kernels on for {' '.join(ARCHITECTURES)}+PTX (INTERFLOW_CUDA=1)" in done.stdout
    assert "warning" not in done.stderr, done.stderr[-4000:]
    return Built(folder / "interflow_kernels/_cuda.abi3.so", folder / "cuda", time.perf_counter() - start)


@functools.cache
def read_kernels() -> list[Kernel]:
    """Every kernel of it for every architecture."""
    folder, program = build().folder, disassembler()

    def read(stem: str) -> list[Kernel]:
        return kernels_of((folder / f"{stem}.log").read_text(), folder / f"{stem}.o", program, BATCHES)

    with ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(read, [cuda_build.object_name(str(file)) for file in KERNEL_FILES]) for kernel in found]


@pytest.fixture(scope="session")
def built() -> Built:
    if TOOLKIT is None:
        pytest.skip("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    return build()


@pytest.fixture(scope="session")
def kernels(built: Built) -> list[Kernel]:
    return read_kernels()
