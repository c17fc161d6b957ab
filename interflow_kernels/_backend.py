"""Which implementation serves which device: chosen automatically, or forced by `backend(...)` or INTERFLOW_BACKEND."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _native
from ._options import shown
from .triton import registration

NAMES = ("auto", "native", "triton", "eager")
"""auto: the best that runs; native: the compiled kernels (C++, CUDA C++); triton; eager: plain PyTorch."""

_ORDER = ("native", "triton")
_warned: set[str] = set()


def _checked(name: str, where: str) -> str:
    if not isinstance(name, str) or name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NAMES))}, got {shown(name)}")
    return name


_requested = _checked(os.environ.get("INTERFLOW_BACKEND", "auto"), "the environment variable INTERFLOW_BACKEND")


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Inside the block, operators run on the implementation `name`; one that cannot run raises RuntimeError.

    The choice holds for the whole process, all threads. Compiled code (`torch.compile`) is guarded on it: called under
    another choice it is compiled anew. Raises ValueError for an unknown name.
    """
    global _requested
    before, _requested = _requested, _checked(name, "backend")
    if "triton" in (before, name):  # elsewhere nothing to do, and torch.compile need not see it
        registration.force(name == "triton")
    try:
        yield
    finally:
        _requested = before
        if "triton" in (before, name):
            registration.force(before == "triton")


def requested() -> str:
    return _requested


def reason_against(name: str, device: str, index: int | None = None) -> str | None:
    """None where implementation `name` runs on `device` ("cpu", "cuda", ...; of GPUs number `index`), else cause and remedy in one sentence."""
    if name == "eager":
        return None
    if name == "native":
        if device in ("cpu", "meta"):
            return _native.cpu_error
        if device == "cuda" and torch.version.hip is None:
            return _native.device_error(index)
        return f"there are no compiled kernels for device {device!r}; plain PyTorch runs there"
    return registration.reason_against(device)


def select(device: str, index: int | None = None, dtype: torch.dtype | None = None) -> str:
    """ "native", "triton" or "eager" for a device and dtype; a forced choice that cannot run raises RuntimeError."""
    if _requested == "eager":
        return "eager"
    if dtype is torch.float64 and (device not in ("cpu", "meta") or _requested == "triton"):
        if _requested != "auto":
            raise RuntimeError(f"backend {_requested!r} was asked for but has no fp64 kernels for device {device!r}; ask for 'auto' or 'eager', or use fp32")
        return "eager"
    if _requested != "auto":
        reason = reason_against(_requested, device, index)
        if reason is not None:
            raise RuntimeError(f"backend {_requested!r} was asked for but cannot run on device {device!r}: {reason}")
        return _requested
    for name in _ORDER:
        if reason_against(name, device, index) is None:
            if name == "triton":
                registration.serve(device, index)
            return name
    if not torch.compiler.is_compiling() and device not in _warned:
        _warned.add(device)
        reasons = "; ".join(f"{name}: {reason_against(name, device, index)}" for name in _ORDER if name == "native" or device != "cpu")
        warnings.warn(f"interflow_kernels runs in plain PyTorch on device {device!r}: {reasons}", stacklevel=4)
    return "eager"


registration.install()
registration.force(_requested == "triton")
