"""Loads the compiled libraries once, at import, or remembers in one sentence why not and what mends it."""

import platform
from pathlib import Path

import torch

MINIMUM_TORCH = (2, 10)
_REBUILD = "reinstall with: pip install --no-build-isolation --force-reinstall --no-deps ."


def torch_version() -> tuple[int, int]:
    """(major, minor) of the running torch."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


def library_path(stem: str) -> Path | None:
    """The compiled library of this package whose file name starts with `stem`, e.g. "_cpu"."""
    found = sorted(Path(__file__).parent.glob(f"{stem}.*so"))
    return found[0] if found else None


def _load_cpu() -> str | None:
    if torch_version() < MINIMUM_TORCH:
        return f"the kernels need torch >= 2.10, this is torch {torch.__version__}; upgrade torch"
    path = library_path("_cpu")
    if path is None:
        if platform.system() != "Linux":
            return f"no compiled kernels for {platform.system()}: they are built on Linux (x86-64, aarch64) only"
        return f"the compiled library _cpu is missing from the installed package; {_REBUILD}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"the compiled library does not load into torch {torch.__version__} ({error}); {_REBUILD}"
    return None


cpu_error: str | None = _load_cpu()
"""None where the schemas and the CPU kernels are registered, else cause and remedy in one sentence."""
