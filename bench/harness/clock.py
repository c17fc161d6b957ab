"""How long a call takes, a turn at a time, and a clock that hands measured samples to pytest-benchmark.

A turn runs a provider once untimed and then times it, so that each is timed in its own steady allocator state. Without that a
provider pays for its neighbour: glibc returns the top of the heap to the system when one provider frees its large maps, and
the next one takes page faults for memory that it would find ready when it runs by itself.
"""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

TURN_SECONDS = 2e-4  # shorter calls are timed several at a time
GRAPH_CALLS = 20


class ReplayTimer:
    """A clock for pytest-benchmark: the time of the next sample between each pair of calls, real time where none is loaded."""

    def __init__(self) -> None:
        self._ticks: Iterator[float] | None = None

    def load(self, samples: Sequence[float]) -> None:
        def ticks() -> Iterator[float]:
            now = 0.0
            for sample in samples:
                yield now
                now += sample
                yield now

        self._ticks = ticks()

    def __call__(self) -> float:
        if self._ticks is not None:
            tick = next(self._ticks, None)
            if tick is not None:
                return tick
            self._ticks = None
        return time.perf_counter()


REPLAY = ReplayTimer()


def synchronize(device: torch.device) -> None:
    """Waits until the device is done; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rotation(sets: int, seed: int = 0) -> Iterator[int]:
    """Which input set is next, for all providers of a case together: at random among the third that was used longest ago.

    So none finds in the cache what its neighbour read, and none always gets the same sets: in strict order it would, and sets differ by a
    percent or two, by where their pages lie.
    """
    order, choose = list(range(sets)), random.Random(seed)
    while True:
        order.append(order.pop(choose.randrange(max(1, sets // 3))))
        yield order[-1]


def call_turn(call: Callable[[int], Any], turns: Iterator[int], device: torch.device) -> Callable[[], float]:
    """Seconds a call, seen by the caller: once untimed, then one call or, where it is short, the mean of several. `turns`: the rotation."""
    for _ in range(3):
        call(next(turns))
    synchronize(device)
    start = time.perf_counter()
    call(next(turns))
    synchronize(device)
    calls = min(100, max(1, math.ceil(TURN_SECONDS / (time.perf_counter() - start))))

    def turn() -> float:
        call(next(turns))
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call(next(turns))
        synchronize(device)
        return (time.perf_counter() - start) / calls

    return turn


def graph_turn(call: Callable[[int], Any], sets: int, device: torch.device) -> Callable[[], float]:
    """Seconds a call, seen by a GPU: events around the replay of a graph of at least 20 calls over the rotating sets.

    Every set is called once before, on the stream that is then captured: what a call keeps for the next one (a forward pass whose backward alone
    is timed) is there by then, and its backward runs on that stream.
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for i in range(max(3, sets)):
            call(i % sets)
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    calls = max(GRAPH_CALLS, sets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for i in range(calls):
            call(i % sets)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def turn() -> float:
        graph.replay()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls

    return turn


def host_seconds(call: Callable[[int], Any], device: torch.device, calls: int = 20, at_most: float = 0.5) -> float:
    """The median time until a call returns to its caller, who does not wait for the device; fewer than `calls` where they take longer than `at_most`."""
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < calls and (len(taken) < 3 or time.perf_counter() - begun < at_most):
        synchronize(device)
        start = time.perf_counter()
        call(0)
        taken.append(time.perf_counter() - start)
    synchronize(device)
    return sorted(taken)[len(taken) // 2]
