"""What a call keeps for backward, and the most it needs while it runs."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def saved_bytes(forward: Callable[[], Any], given: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps of one forward pass, each storage once, without those of `given` (inputs, parameters)."""
    known = {x.untyped_storage().data_ptr() for x in given}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = forward()  # alive until counted, or a freed storage's address comes back for another
        total = sum(held.values())
        del result
    return total


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """How far a call's memory rises above what was there before it, at most; None where the system does not tell.

    GPU: the allocator's own count. CPU: the process's resident set (Linux: its high-water mark, reset first), with freed memory given
    back to the system before; what the call finds again in the allocator's free lists is not counted, so this is a lower bound.
    """
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        call()
        return max(0, _status("VmHWM") - before)
    return None


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key + ":")).split()[1]) << 10
