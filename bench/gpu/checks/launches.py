"""How the kernels are launched: capture as the first call, any number of blocks, many launches, several streams and graphs: always the same bits."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from interflow_kernels import FusedInterflowHead, stage_tap
from interflow_kernels.testing import assert_same_bits

from . import Check

tap = torch.ops.interflow_kernels.stage_tap.default
BF16 = torch.bfloat16


def checks(device: torch.device) -> Iterator[Check]:
    yield Check("capture as the first call", partial(capture_first, device))
    yield Check("any number of blocks", partial(any_blocks, device))
    for layout in (torch.channels_last, torch.contiguous_format):
        name = str(layout).removeprefix("torch.")
        yield Check(f"many launches of the head, one result, {name}", partial(many_heads, layout, device))
        yield Check(f"many launches of the tap, one result, {name}", partial(many_taps, layout, device))
    yield Check("two streams at once", partial(two_streams, device))
    yield Check("two graphs at once", partial(two_graphs, device))


def images(device: torch.device, batch: int, channels: int, pixels: int, layout: torch.memory_format = torch.channels_last, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = pixels if device.type == "cuda" else max(pixels // 8, 2)
    return torch.randn(batch, channels, pixels, pixels, generator=generator).to(device, BF16).contiguous(memory_format=layout)


def made_head(channels: tuple[int, ...], classes: int, device: torch.device) -> FusedInterflowHead:
    torch.manual_seed(0)
    return FusedInterflowHead(channels, classes, device=device, dtype=BF16)


def same(what: str, got: list[Tensor], wanted: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(got, wanted, strict=True)):
        assert_same_bits(f"result {i} {what}", a, b)


@contextmanager
def recorded(device: torch.device) -> Iterator[Callable[[], None]]:
    """Calls inside are captured; gives what replays them. On a CPU they run, once."""
    if device.type == "cpu":
        yield lambda: None
        return
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        yield graph.replay


def capture_first(device: torch.device) -> None:
    maps, head = [images(device, 4, c, s) for c, s in ((64, 56), (128, 28))], made_head((64, 128), 10, device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    with torch.no_grad():
        with recorded(device) as replay:
            found = [head(maps), *tap(maps[0], None, True, True)]
        for _ in range(3):
            replay()
        same("of the graph", found, [head(maps), *tap(maps[0], None, True, True)])


def any_blocks(device: torch.device) -> None:
    x, head = images(device, 19, 64, 56), made_head((64,), 100, device)
    run = partial(with_gradients, head, x)
    whole = run()
    before = os.environ.pop("INTERFLOW_MAX_BLOCKS", None)
    try:
        for blocks in ("0", "1", "2", "7"):
            os.environ["INTERFLOW_MAX_BLOCKS"] = blocks
            same(f"with at most {blocks} blocks", run(), whole)
    finally:
        os.environ.pop("INTERFLOW_MAX_BLOCKS", None)
        if before is not None:
            os.environ["INTERFLOW_MAX_BLOCKS"] = before


def with_gradients(head: FusedInterflowHead, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of both operators."""
    leaf = x.detach().requires_grad_()
    m, p = stage_tap(leaf)
    assert m is not None
    y = head([leaf])
    outputs = [y, m, p]
    return [t.detach() for t in outputs] + list(torch.autograd.grad(outputs, [leaf, *head.parameters()], [torch.ones_like(t) for t in outputs]))


def many_heads(layout: torch.memory_format, device: torch.device) -> None:
    x, head = images(device, 32, 128, 56, layout), made_head((128,), 1000 if device.type == "cuda" else 10, device)
    with torch.no_grad():
        first = head([x])
        for number in range(2000 if device.type == "cuda" else 3):
            assert torch.equal(first, head([x])), f"launch {number} differs from the first"


def many_taps(layout: torch.memory_format, device: torch.device) -> None:
    x, head = images(device, 8, 64, 56, layout), made_head((64,), 10, device)
    first = with_gradients(head, x)
    for number in range(200 if device.type == "cuda" else 2):
        same(f"of launch {number}", with_gradients(head, x), first)


def two_streams(device: torch.device) -> None:
    xs, head = [images(device, 17, 64, 56, seed=seed) for seed in (0, 1)], made_head((64,), 100, device)
    wanted = [with_gradients(head, x) for x in xs]
    if device.type == "cpu":
        return
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append((i, with_gradients(head, xs[i])))
    torch.cuda.synchronize()
    for i, results in found:
        same(f"on stream {i}", results, wanted[i])


def two_graphs(device: torch.device) -> None:
    """Captured on one stream, replayed on two at once: they must not share counters."""
    xs, head = [images(device, 17, 64, 56, seed=seed) for seed in (0, 1)], made_head((64,), 100, device)
    with torch.no_grad():
        run = [partial(lambda x: [head([x]), *tap(x, None, True, True)], x) for x in xs]
        wanted = [r() for r in run]
        made = []
        for r in run:
            with recorded(device) as replay:
                results = r()
            made.append((replay, results))
    if device.type == "cpu":
        return
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(50):
        for (replay, _), stream in zip(made, streams, strict=True):
            with torch.cuda.stream(stream):
                replay()
        torch.cuda.synchronize()
        for i, (_, results) in enumerate(made):
            same(f"of graph {i}", results, wanted[i])
