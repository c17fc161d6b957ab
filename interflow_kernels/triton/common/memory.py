"""Allocating results and workspaces: each is settled once for a shape, and called for a new tensor whose values are undefined."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..._tap_format import new_map

Allocation = Callable[[], Tensor]

fill_is_on = torch.are_deterministic_algorithms_enabled
"""Whether torch fills new memory, as it does while deterministic algorithms are on."""


class Memory:
    """Allocations on one device; fill: see `fill_is_on`.

    By what Inductor's own code allocates with, on the current device and past the dispatcher, in a third of the time; where this
    torch does not have it, or memory is to be filled, by torch.empty_strided.
    """

    def __init__(self, device: torch.device, fill: bool) -> None:
        self._device = device
        self._short = None if fill else getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)

    def strided(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Allocation:
        if self._short is not None:
            return functools.partial(self._short, tuple(shape), tuple(strides), dtype)
        return functools.partial(torch.empty_strided, tuple(shape), tuple(strides), dtype=dtype, device=self._device)

    def dense(self, shape: Sequence[int], dtype: torch.dtype) -> Allocation:
        """Contiguous."""
        return self.strided(shape, torch.empty(tuple(shape), device="meta").stride(), dtype)

    def nothing(self, dtype: torch.dtype) -> Allocation:
        """[0], for a result that is not needed."""
        return self.dense((0,), dtype)

    def map(self, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Allocation:
        """[B, C, H, W] in channels_last or contiguous memory."""
        return self.strided(shape, new_map(torch.empty(0, device="meta"), shape, dtype, channels_last).stride(), dtype)
