"""Maps of more than 2^31 elements, whose offsets need 64 bits. On a CPU the same on a few images."""

from collections.abc import Iterator
from functools import partial

import torch

from interflow_kernels import FusedInterflowHead

from . import Check, Skipped

tap = torch.ops.interflow_kernels.stage_tap.default
tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
BATCH, MAP = 1400, (128, 112, 112)  # 2.2e9 elements
NEEDED = 24 << 30  # bytes


def checks(device: torch.device) -> Iterator[Check]:
    for layout in (torch.channels_last, torch.contiguous_format):
        name = str(layout).removeprefix("torch.")
        yield Check(f"beyond 2^31 elements, tap {name}", partial(large_tap, layout, device))
        yield Check(f"beyond 2^31 elements, head {name}", partial(large_head, layout, device))


def zeros_and_ones(layout: torch.memory_format, device: torch.device) -> torch.Tensor:
    """Zeros, and ones in the last image."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < NEEDED:
            raise Skipped(f"needs {NEEDED >> 30} GiB of free GPU memory, {torch.cuda.mem_get_info()[0] >> 30} are free")
    shape = (BATCH, *MAP) if device.type == "cuda" else (4, 128, 8, 8)
    u = torch.empty(shape, device=device, dtype=torch.bfloat16, memory_format=layout).zero_()
    u[-1].fill_(1.0)
    return u


def large_tap(layout: torch.memory_format, device: torch.device) -> None:
    u = zeros_and_ones(layout, device)
    pixels = u.shape[2] * u.shape[3]
    m, p, mask = tap(u, None, True, True)
    assert not m[:-1].any() and m[-1].eq(1).all(), "m"
    assert not p[:-1].any() and p[-1].eq(1).all(), "p"
    del m
    du, dshift = tap_backward(None, torch.full_like(p, pixels), mask, u, True, layout is torch.channels_last, True)
    assert not du[:-1].any() and du[-1].eq(1).all(), "du"
    assert dshift.eq(pixels).all(), "dshift"


def large_head(layout: torch.memory_format, device: torch.device) -> None:
    u = zeros_and_ones(layout, device)
    torch.manual_seed(0)
    head = FusedInterflowHead((128,), 10, device=device, dtype=torch.bfloat16)
    with torch.no_grad():
        y = head([u])
        assert torch.equal(y[-1], head([u[-1:]])[0]), "the last image differs from the same image alone"
        assert torch.equal(y[:1], y[-2:-1]) and not torch.equal(y[0], y[-1]), "images of zeros differ"
