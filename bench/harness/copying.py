"""The copy that shares are of: on a GPU the faster of the driver's and a kernel's, as measured there.

In a replayed graph on an NVIDIA H200 (torch 2.11, driver 580) the driver's copy of half a GiB, which copy_ asks for, moved 2.7 TB/s and an elementwise
kernel 4.2 (bench/results/nvidia-h200/speed.json): a share of the first alone would flatter every kernel.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .clock import graph_turn

COPY_BYTES = 512 << 20
DRIVERS, KERNELS = "copy", "copy by a kernel"
Copy = Callable[[int], Any]
_faster: dict[torch.device, str] = {}


def copies(x: Tensor, y: Tensor) -> dict[str, Copy]:
    """Both ways from x to y, of one shape and dtype. neg flips each sign, which costs a kernel nothing beside the bytes."""
    return {DRIVERS: lambda i: y.copy_(x), KERNELS: lambda i: torch.neg(x, out=y)}


def faster_copy(x: Tensor, y: Tensor) -> Copy:
    """The way that is faster on this device, measured by the first call with these tensors; copy_ on a CPU."""
    ways = copies(x, y)
    if x.device.type != "cuda":
        return ways[DRIVERS]
    if x.device not in _faster:
        turns = {name: graph_turn(way, 1, x.device) for name, way in ways.items()}
        times = {name: statistics.median(turn() for _ in range(5)) for name, turn in turns.items()}
        _faster[x.device] = min(times, key=times.__getitem__)
    return ways[_faster[x.device]]
