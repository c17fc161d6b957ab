"""Both operators in Triton, a few shapes: each is a compilation. On a CPU by Triton's interpreter."""

import importlib.util
import os
from collections.abc import Iterator
from functools import partial

import torch

from interflow_kernels.testing import HeadCase, TapCase

from . import Check, Skipped, head, tap

MAPS = ((40, 7, 5), (17, 3, 3))


def checks(device: torch.device) -> Iterator[Check]:
    bf16 = torch.bfloat16
    for layout in ("channels_last", "contiguous"):
        yield Check(f"triton tap {layout}", partial(where_it_runs, device, partial(tap.check, TapCase(dtype=bf16, layout=layout), ("dm",), device)))
    for attention in ("nxn", "gated"):
        case = HeadCase(2, MAPS, 10, attention, layout="channels_last", dtype=bf16)
        yield Check(f"triton head {attention}", partial(where_it_runs, device, partial(head.check, case, device)))


def where_it_runs(device: torch.device, check: partial[None]) -> None:
    if importlib.util.find_spec("triton") is None:
        raise Skipped("Triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("on a CPU Triton's kernels run with TRITON_INTERPRET=1")
    check()
