"""The portable twin on a GPU: both operators in Triton beside the CUDA kernels and torch.compile. goals.GPU_TWIN has the goals.

Cases of their own: a Triton kernel that is wrong or does not compile there fails them alone.
"""

from collections.abc import Iterator
from typing import Any

import bench_head
import bench_stage_tap
import torch
from harness.case import Plan
from harness.run import Session

MODES = ("ours", "Triton", "eager", "compiled")


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """bf16, 224 pixels, all five boundaries and the head; nothing on a CPU, which Triton does not serve."""
    if device.type != "cuda":
        return
    for layout in ("channels_last", "nchw"):
        for batch in (32, 128):
            yield bench_head.plan("forward", device, MODES, "bf16", layout, batch, seconds=0.8)
            for direction in ("forward keeping masks", "backward"):
                yield bench_stage_tap.plan("five boundaries", direction, "bf16", layout, batch, True, MODES, device, 0.8)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)
