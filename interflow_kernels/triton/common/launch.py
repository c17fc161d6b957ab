"""Launching: a kernel on one set of shapes is compiled at its first call, and from then on handed the addresses of its tensors.

The usual ways are public ones: `kernel[grid](...)` compiles, binds and returns the compiled kernel, `compiled[grid](...)` launches it.
The short way calls `compiled.run` as Triton's own `kernel[grid]` does, past the binder, whose cost grows with the arguments, and past
the hooks of profilers, where there are none. It is taken with the versions and on the GPUs whose launchers it was read for, and
where all tensors are aligned to 16 bytes. Triton specialises on that, on AMD also on whether memory is within 2 GiB, for offsets of
32 bits; integers are declared `do_not_specialize`. One shape's offsets stay where they are in any memory, so a Launcher need not ask.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .math import INTERPRETED

SHORT_WAY = ((3, 6), (3, 9))
"""The first and the last version of Triton whose `compiled.run(x, y, z, stream, function, metadata, launch_metadata, enter, exit, *arguments)` was read."""

_is_known_version = SHORT_WAY[0] <= tuple(map(int, triton.__version__.split(".")[:2])) <= SHORT_WAY[1]
_compiled: dict[Any, Any] = {}
_counters: dict[tuple[int, int], Tensor] = {}
_address = Tensor.data_ptr


class Launch(NamedTuple):
    """A launch as it was noted."""

    kernel: Any
    programs: int
    arguments: Sequence[Any]
    constants: tuple[Any, ...]
    warps: int
    stages: int

    def again(self) -> Any:
        """Launches it once more; what Triton compiled for it, None under the interpreter."""
        return _launch_by_triton(*self)


_noted: list[Launch] | None = None
_launching = True


@contextmanager
def noted(launching: bool = True) -> Iterator[list[Launch]]:
    """Inside it, launches are noted as they happen, for the tuner and for tests; `launching=False`: and nothing else is done."""
    global _noted, _launching
    before, _noted, _launching = (_noted, _launching), [], launching
    try:
        yield _noted
    finally:
        _noted, _launching = before


# --- the device ---------------------------------------------------------------------------------------------------------
def _is_watched() -> bool:
    """Whether a profiler has hooks on launches."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # chains of hooks, or one set by hand


def elsewhere(t: Tensor) -> AbstractContextManager[Any] | None:
    """The guard under which kernels on t's GPU are launched; None where that is the current one."""
    index = t.get_device()
    if index < 0 or INTERPRETED or index == driver.active.get_current_device():
        return None
    return torch.cuda.device(index) if t.is_cuda else torch.xpu.device(index)


def options(maker: str, width: int, warps: int, stages: int) -> dict[str, Any]:
    """How a kernel is compiled, for launching it and for tests that compile without a GPU; width: threads of the GPU's warp.

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


# --- launching ----------------------------------------------------------------------------------------------------------
def _launch_by_triton(kernel: Any, programs: int, arguments: Sequence[Any], constants: tuple[Any, ...], warps: int, stages: int) -> Any:
    if INTERPRETED:
        kernel[(programs,)](*arguments, *constants)
        return None
    place: Any = None
    classes: list[Any] = []
    for a in arguments:
        if isinstance(a, Tensor):
            place = a.device
            within = torch.version.hip is None or a.untyped_storage().nbytes() < 2**31
            classes.append((a.dtype, a.data_ptr() % 16 == 0, within))
        else:
            classes.append(a is None)
    key = (id(kernel), place, tuple(classes), constants, warps, stages)
    found = _compiled.get(key)
    if found is None:
        width = getattr(torch.cuda.get_device_properties(place), "warp_size", 32) if place.type == "cuda" else 32
        maker = "cuda" if torch.version.cuda and place.type == "cuda" else "other"
        found = _compiled[key] = kernel[(programs,)](*arguments, *constants, **options(maker, width, warps, stages))
    else:
        found[(programs, 1, 1)](*arguments, *constants)
    return found


class Launcher:
    """A kernel on one set of shapes: `launcher(*arguments)` runs `programs` programs of it on the current GPU.

    arguments: the kernel's tensors, None and ints, before its constants in the order of its parameters. Every call has tensors
    of the same dtypes on the same GPU at the same places, and between them the same None and ints.
    """

    __slots__ = ("_constants", "_device", "_fixed", "_kernel", "_order", "_programs", "_run", "_short", "_tensors")

    def __init__(self, kernel: Any, programs: int, constants: tuple[Any, ...], warps: int, stages: int = 1) -> None:
        self._kernel, self._programs, self._constants, self._run = kernel, programs, constants, (warps, stages)
        self._short: Any = None

    def __call__(self, *arguments: Any) -> None:
        short = self._short
        if short is not None and _noted is None and not _is_watched():
            addresses = tuple(map(_address, self._tensors(arguments)))
            if not functools.reduce(or_, addresses) & 15:
                run, function, metadata, stream_of = short
                stream = stream_of(self._device)
                run(self._programs, 1, 1, stream, function, metadata, None, None, None, *self._order(addresses + self._fixed), *self._constants)
                return
        self._launch(arguments)

    def _launch(self, arguments: Sequence[Any]) -> None:
        if self._programs == 0:
            return
        if _noted is not None:
            _noted.append(Launch(self._kernel, self._programs, arguments, self._constants, *self._run))
            if not _launching:
                return
        compiled = _launch_by_triton(self._kernel, self._programs, arguments, self._constants, *self._run)
        if self._short is None and compiled is not None:
            self._shorten(arguments, compiled)

    def _shorten(self, arguments: Sequence[Any], compiled: Any) -> None:
        places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
        tensors = [arguments[i] for i in places]
        aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
        if not (_is_known_version and compiled.metadata.target.backend in ("cuda", "hip") and aligned and len(tensors) > 1):
            return
        others = [i for i in range(len(arguments)) if i not in places]
        self._tensors, self._fixed = itemgetter(*places), tuple(arguments[i] for i in others)
        self._order: Callable[[Any], Any] = itemgetter(*((*places, *others).index(i) for i in range(len(arguments))))
        self._device = tensors[0].get_device()
        self._short = (compiled.run, compiled.function, compiled.packed_metadata, driver.active.get_current_stream)


def counters(like: Tensor, count: int) -> Tensor:
    """At least `count` int32 zeros for a kernel that leaves them zero again, on `like`'s device and the current stream.

    Kernels on one stream follow each other, so they share one slab. A captured graph gets zeros of its own, because two graphs
    captured on one stream may run side by side; so does every call where the stream is not known.
    """
    if not like.is_cuda or torch.cuda.is_current_stream_capturing():
        return torch.zeros(count, dtype=torch.int32, device=like.device)
    index = like.get_device()
    key = (index, driver.active.get_current_stream(index))
    slab = _counters.get(key)
    if slab is None or slab.numel() < count:
        slab = _counters[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=like.device)
    return slab
