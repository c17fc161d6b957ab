"""Loads the compiled libraries once, at import, or remembers in one sentence why not and what mends it."""

import ctypes
import json
import os
import platform
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from ._namespace import NAMESPACE

MINIMUM_TORCH = (2, 10)
_HEAD = f"{NAMESPACE}::interflow_head"
_NEWEST = f"{NAMESPACE}::interflow_pool"
"""The operator that came last: a library without it was built of older sources, although its version may be this one's."""
_AGAIN = "pip install --no-build-isolation --force-reinstall --no-deps ."
_REBUILD = f"reinstall with: {_AGAIN}"


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


_brought = os.environ.get("INTERFLOW_LIBRARIES", "")
libraries = Path(_brought) if _brought else Path(__file__).parent
"""The folder of the compiled libraries and of what is known of their build: this package, or one brought along from another machine."""


def library_path(stem: str) -> Path | None:
    """The compiled library of this package whose file name starts with `stem`, e.g. "_cpu"."""
    found = sorted(libraries.glob(f"{stem}.*so"))
    return found[0] if found else None


def operator_library(device: str = "cpu") -> Path:
    """The file of the compiled operators for `device`, "cpu" or "cuda": what torch.ops.load_library takes where this package is not imported.

    A program that torch.export, torch.jit or AOTInductor saved with our operators in it needs no more than torch and this file
    (for "cuda" both files, the CPU's first: it holds the schemas). Raises ValueError for another device, RuntimeError with cause
    and remedy where the library does not serve here.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    error = cpu_error if device == "cpu" else cuda_error
    path = library_path(f"_{device}")
    if error is not None or path is None:
        raise RuntimeError(f"there is no library of compiled operators for {device!r}: {error}")
    return path.resolve()


def build_info() -> dict[str, Any] | None:
    """What is known of the build, or None where nothing was built: from the file beside the libraries, which any Python reads, else from _C."""
    written = libraries / "build_info.json"
    try:
        if written.exists():
            return dict(json.loads(written.read_text()), has_avx2=_has_avx2())
        if _brought:
            return None  # a _C beside this file belongs to other libraries
        from . import _C
    except (ImportError, ValueError):
        return None
    return dict(_C.build_info(), has_avx2=_C.has_avx2())


def _has_avx2() -> bool:
    """Whether this processor has AVX2, FMA and F16C, as Linux tells it."""
    try:
        flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    except OSError:
        flags = []
    return {"avx2", "fma", "f16c"} <= set(flags)


def python_error() -> str | None:
    """None where the module _C is for the running Python or not there, else one sentence: the libraries serve any Python, _C does not."""
    found = [path.name for path in sorted(Path(__file__).parent.glob("_C.*so"))]
    if not found or any(name == f"_C{suffix}" for name in found for suffix in EXTENSION_SUFFIXES):
        return None
    running = f"this is {sys.implementation.cache_tag}"
    if build_info() is not None:
        return f"_C was built for another Python ({found[0]}, {running}); the kernels do not need it"
    return f"what was built is unknown: build_info.json is missing and _C was built for another Python ({found[0]}, {running}); {_REBUILD}"


def _whose() -> str:
    """The folder of the libraries, for a sentence."""
    return f"the folder that INTERFLOW_LIBRARIES names, {libraries}" if _brought else "the installed package"


def schemas_exist() -> bool:
    """Whether the operators are defined in this process, by whomever."""
    return bool(torch._C._jit_get_schemas_for_operator(_HEAD))


def _loaded(path: Path, kind: str) -> str | None:
    """Loads a library; None where its operators serve, or those of another copy of its version that came first, else why not."""
    torch.ops.load_library(path)
    refusal = getattr(ctypes.CDLL(str(path)), f"{NAMESPACE}_{kind}_refusal")  # csrc/common/registration.h
    refusal.restype = ctypes.c_char_p
    text = refusal()
    return None if text is None else f"{text.decode()}; load one version of it alone"


def _load_cpu() -> str | None:
    if torch_version() < MINIMUM_TORCH:
        return f"the kernels need torch >= 2.10, this is torch {torch.__version__}; upgrade torch"
    if schemas_exist() and torch._C._dispatch_has_kernel_for_dispatch_key(_HEAD, "AutocastCPU"):  # as ops/ registers it
        return "another copy of this Python package serves the operators in this process; import one of them alone"
    path = library_path("_cpu")
    if path is None:
        if platform.system() != "Linux":
            return f"no compiled kernels for {platform.system()}: they are built on Linux (x86-64, aarch64) only"
        return f"the compiled library _cpu is missing from {_whose()}; {_REBUILD}"
    try:
        error = _loaded(path, "cpu")
        if error is None and not torch._C._jit_get_schemas_for_operator(_NEWEST):
            return f"the compiled library _cpu of {_whose()} was built of older sources, without {_NEWEST}; {_REBUILD}"
        return error
    except (OSError, AttributeError) as error:  # AttributeError: of other sources, brought along or left over
        return f"the compiled library does not load into torch {torch.__version__} ({error}); {_REBUILD}"


def _load_cuda() -> str | None:
    """Needs no GPU and leaves CUDA as it is: the library's kernels are handed to the driver when the first of them runs."""
    ours = torch.version.cuda
    if ours is None:
        return f"torch {torch.__version__} is a build without CUDA; install one with CUDA, see https://pytorch.org/get-started/locally"
    if cpu_error is not None:
        return cpu_error
    built = build_info() or {}
    if not built.get("cuda"):
        reason = built.get("cuda_reason") or python_error() or "no build information"
        return f"the CUDA kernels were not built ({reason}); reinstall with: INTERFLOW_CUDA=1 {_AGAIN}"
    if built["cuda"].split(".")[0] != ours.split(".")[0]:
        return (
            f"the CUDA kernels were built by CUDA {built['cuda']}, torch {torch.__version__} has CUDA {ours}; "
            f"reinstall with: CUDA_HOME=/usr/local/cuda-{ours} INTERFLOW_CUDA=1 {_AGAIN}"
        )
    path = library_path("_cuda")
    if path is None:
        return f"the compiled library _cuda is missing from {_whose()}; reinstall with: INTERFLOW_CUDA=1 {_AGAIN}"
    try:
        return _loaded(path, "cuda")
    except (OSError, AttributeError) as error:
        return f"the CUDA library does not load into torch {torch.__version__} ({error}); reinstall with: INTERFLOW_CUDA=1 {_AGAIN}"


def architecture_error(built: str, capability: tuple[int, int], name: str) -> str | None:
    """None where a library built for `built` ("80 90a 120+PTX") has code for a GPU of this capability, else cause and remedy.

    A GPU runs code of its own major version and the same or an older minor one; of "90a" only 9.0 does; PTX serves what is newer than it.
    """
    major, minor = capability
    number = 10 * major + minor
    for word in built.split():
        code, _, ptx = word.partition("+")
        exact = not code.isdecimal()
        target = int(code.rstrip("a"))
        if number == target or (not exact and target // 10 == major and target <= number) or (ptx and not exact and target <= number):
            return None
    if number < 80:
        return f"{name} has compute capability {major}.{minor}, the kernels need 8.0 (Ampere) or newer; backend('triton') or 'eager' runs there"
    return (
        f"{name} has compute capability {major}.{minor}, the CUDA kernels were built for {built}; "
        f"reinstall with: TORCH_CUDA_ARCH_LIST='{major}.{minor}' INTERFLOW_CUDA=1 {_AGAIN}"
    )


def device_error(index: int | None) -> str | None:
    """None where the CUDA kernels run on this GPU (None: the current one), else cause and remedy. Asked of CUDA once for each GPU."""
    if cuda_error is not None:
        return cuda_error
    if index is None:
        index = torch.cuda.current_device()
    if index not in _device_errors:
        built = build_info() or {}
        _device_errors[index] = architecture_error(
            built.get("cuda_architectures", ""), torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index)
        )
    return _device_errors[index]


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: a second for everybody.
device_error._dynamo_marked_constant = True  # type: ignore[attr-defined]

_device_errors: dict[int, str | None] = {}

cpu_error: str | None = _load_cpu()
"""None where the schemas and the CPU kernels are registered, else cause and remedy in one sentence."""

taken: str | None = cpu_error if cpu_error is not None and schemas_exist() else None
"""None where the operators' names are free or ours, else why nothing of this package may register under them."""

cuda_error: str | None = _load_cuda()
"""None where the CUDA kernels are registered, else cause and remedy in one sentence. Whether they run on a GPU: device_error."""
