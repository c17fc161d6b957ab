"""Launching: a compiled kernel is looked up once for a shape and then called directly, past Triton's argument binder.

Only public parts of Triton are used: `kernel[grid](...)` compiles and returns the compiled kernel, and `compiled[grid](...)`
launches it (as Triton's own softmax tutorial does). Pointers are the only arguments that Triton specialises on here, by their
16-byte alignment; integers are declared `do_not_specialize`.
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._math import INTERPRETED

_compiled: dict[Any, Any] = {}
_counters: dict[tuple[torch.device, int], Tensor] = {}


class Launch(NamedTuple):
    """The arguments of one call of `launch`."""

    kernel: Any
    programs: int
    arguments: Sequence[Any]
    constants: tuple[Any, ...]
    warps: int
    stages: int


_noted: list[Launch] | None = None


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Inside it, launches are noted as they happen, for the tuner."""
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def on_device(t: Tensor) -> AbstractContextManager[Any]:
    """The guard under which kernels on t's device are launched."""
    if t.is_cuda:
        return nullcontext() if t.device.index == torch.cuda.current_device() else torch.cuda.device(t.device)
    return torch.xpu.device(t.device) if t.device.type == "xpu" else nullcontext()


PARTS, FP32_UNITS, MULTIPLY_ADDS = "parts", "fp32 units", "multiply-adds"


def products(maker: str, capability: int, width: int) -> str:
    """How the head's products run: in parts on bf16 matrix units, or fp32 as it is, on matrix units for fp32 or by multiply-adds.

    CDNA ("hip", warps of 64) has units for fp32; on RDNA the splitting alone costs more than multiply-adds. NVIDIA has bf16 units from capability 80 on.
    """
    if maker == "hip":
        return FP32_UNITS if width == 64 else MULTIPLY_ADDS
    return PARTS if capability >= 80 else MULTIPLY_ADDS


@functools.cache
def products_on(device: torch.device) -> str:
    """`products` of a device; other makers' GPUs, and the interpreter, take parts."""
    if device.type != "cuda":
        return PARTS
    major, minor = torch.cuda.get_device_capability(device)
    return products("hip" if torch.version.hip else "cuda", 10 * major + minor, torch.cuda.get_device_properties(device).warp_size)


def options(maker: str, width: int, warps: int, stages: int) -> dict[str, Any]:
    """How a kernel is compiled, for `launch` and for tests that compile without a GPU; width: threads of the GPU's warp.

    FP fusion is off, so that a new version of Triton with another default gives the same bits; products are not touched by it.
    `warps` count 32 threads: a thread then holds as much on every GPU, and accesses 16 bytes at a time.
    `stages`: how many tiles a loop with a product reads ahead on NVIDIA GPUs; elsewhere that costs registers, and is 1.
    """
    found: dict[str, Any] = dict(num_warps=max(1, warps * 32 // width), num_stages=1, enable_fp_fusion=False)
    if maker == "cuda":
        found["num_stages"] = stages
        if stages == 1:
            found["maxnreg"] = 128  # else ptxas spills two registers on sm_100 to fit one program more
    return found


def launch(kernel: Any, programs: int, arguments: Sequence[Any], constants: tuple[Any, ...], warps: int, stages: int = 1) -> Any:
    """Runs `programs` programs of a kernel: its tensors, None and ints first, its constants after them, in the order of its parameters.

    Returns what Triton compiled, None under the interpreter.
    """
    if programs == 0:
        return None
    if _noted is not None:
        _noted.append(Launch(kernel, programs, arguments, constants, warps, stages))
    if INTERPRETED:
        kernel[(programs,)](*arguments, *constants)
        return None
    place: Any = None
    classes: list[Any] = []
    for a in arguments:
        if isinstance(a, Tensor):
            place = a.device
            classes.append((a.dtype, a.data_ptr() % 16 == 0))
        else:
            classes.append(a is None)
    key = (id(kernel), place, tuple(classes), constants, warps, stages)
    found = _compiled.get(key)
    if found is None:
        width = getattr(torch.cuda.get_device_properties(place), "warp_size", 32) if place.type == "cuda" else 32
        maker = "cuda" if torch.version.cuda and place.type == "cuda" else "other"
        found = kernel[(programs,)](*arguments, *constants, **options(maker, width, warps, stages))
        _compiled[key] = found
        return found
    found[(programs, 1, 1)](*arguments, *constants)
    return found


def counters(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros for a kernel that leaves them zero again, on `like`'s device and the current stream.

    Kernels on one stream follow each other, so they share one slab. A captured graph gets zeros of its own, because two graphs
    captured on one stream may run side by side; so does every call where the stream is not known.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    key = (like.device, torch.cuda.current_stream(like.device).cuda_stream)
    slab = _counters.get(key)
    if slab is None or slab.numel() < count:
        slab = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
    return slab
