"""What several processes of one training must do together: gather values, and end with one sentence."""

from collections.abc import Sequence
from typing import TypeVar

import torch.distributed as dist

from .errors import UserError

T = TypeVar("T")


class EveryProcessError(UserError):
    """A UserError that every process of a training raises at the same point: only the first one has to print it."""


def rank() -> int:
    """The number of this process; 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gathered(value: T) -> list[T]:
    """The values of all processes, by rank; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def own(values: Sequence[T]) -> T | None:
    """This process's part of what `gathered` gave; None where there were fewer processes then."""
    return values[rank()] if rank() < len(values) else None
