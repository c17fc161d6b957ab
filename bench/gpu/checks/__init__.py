"""Checks of the kernels on a device, each small, named and beside an expectation from the CPU; `python -m gpu.checks GROUP` runs a group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Check:
    """`run` raises where something is wrong. rehearsed: on a CPU too, where only a few of many alike run."""

    name: str
    run: Callable[[], None]
    rehearsed: bool = True


class Skipped(Exception):
    """This machine cannot run the check; the message says why."""


Checks = Callable[[torch.device], Iterator[Check]]
