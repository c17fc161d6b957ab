"""Builds the compiled part of interflow-kernels; everything else is in pyproject.toml.

_C    pybind11 module: build information. A translation unit of its own, without torch headers.
_cpu  operator schemas and CPU kernels over torch's stable ABI: one binary for every torch >= 2.10, loaded by torch.ops.

INTERFLOW_NATIVE=0 builds no compiled part: the package then runs in plain PyTorch. MAX_JOBS limits the compiler processes.
"""

import os
import platform
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10


def wanted() -> bool:
    """Whether the compiled part is built: on Linux, unless INTERFLOW_NATIVE=0."""
    asked = os.environ.get("INTERFLOW_NATIVE", "1" if platform.system() == "Linux" else "0")
    if asked not in ("0", "1"):
        raise SystemExit(f"INTERFLOW_NATIVE must be 0 or 1, got {asked!r}")
    print(f"interflow-kernels: compiled part {'on' if asked == '1' else 'off'} (INTERFLOW_NATIVE, {platform.system()} {platform.machine()})")
    return asked == "1"


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def extensions() -> dict:
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"interflow-kernels: {error}. With --no-build-isolation, install the build requirements first: pip install torch setuptools ninja pybind11"
        ) from None
    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]
    # The stable headers are included as system headers would be: only our own warnings are ours to mend.
    information = {"INTERFLOW_TORCH_VERSION": torch.__version__, "INTERFLOW_STABLE_ABI": "2.10"}
    module = CppExtension(
        "interflow_kernels._C",
        ["csrc/bindings.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args=[*flags, *(f'-D{name}="{value}"' for name, value in information.items())],
    )
    module.libraries = []  # no torch in it
    library = CppExtension(
        "interflow_kernels._cpu",
        sources("csrc/library.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*flags, STABLE_ABI],
        py_limited_api=True,
    )
    library.libraries = ["torch_cpu"]
    return {"ext_modules": [module, library], "cmdclass": {"build_ext": BuildExtension.with_options(no_python_abi_suffix=False)}}


setup(**(extensions() if wanted() else {}))
