"""Every CPU operator on tensors that lie directly before or behind an inaccessible page: a read or write outside them ends the process.

    LD_PRELOAD=guard_allocator.so python tests/guard_pages.py {quick,full,faults}

Inputs are placed here, by mmap and mprotect; outputs and scratch memory by guard_allocator.c, which also fills them with NaN and takes
them away when they are freed. Results must have the bits of the same call on ordinary memory. Each case is printed before it runs, so
that the last line names the one that ended the process. "faults" makes faults on purpose, which must end theirs.
"""

import ctypes
import itertools
import mmap
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

import interflow_kernels  # noqa: F401  # which registers the operators
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import assert_same_bits

PAGE = mmap.PAGESIZE
NOBODY = 0
"""PROT_NONE."""
LIBC = ctypes.CDLL(None, use_errno=True)
OPS = torch.ops.interflow_kernels
BEHIND, BEFORE = "behind", "before"
"""Where the inaccessible page is: behind the last byte of a tensor's memory, or before its first."""
SIDES = {BEHIND: 1, BEFORE: 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("contiguous", "channels_last", "cropped", "cropped channels_last")
ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated", "folded")


def protect(address: int, count: int, access: int) -> None:
    if LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(count), access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Memory:
    """Tensors at inaccessible pages; they live as long as this does."""

    def __init__(self, side: str) -> None:
        self.side = side
        self._pages: list[mmap.mmap] = []

    def place(self, t: Tensor | None, readable: bool = True) -> Tensor | None:
        """A tensor of t's values and strides in memory of its own, of just the size of t's extent."""
        if t is None:
            return None
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        count = extent * t.element_size()
        inside = max(1, -(-count // PAGE)) * PAGE
        area = mmap.mmap(-1, inside + 2 * PAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(area))
        start = first + PAGE + (inside - count if self.side == BEHIND else 0)
        self._pages.append(area)
        if count:
            flat = torch.frombuffer((ctypes.c_char * count).from_address(start), dtype=t.dtype)
            placed = flat.as_strided(t.shape, t.stride())
            placed.copy_(t)
        else:
            placed = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        protect(first, PAGE, NOBODY)
        protect(first + PAGE + inside, PAGE, NOBODY)
        if not readable:
            protect(first + PAGE, inside, NOBODY)
        return placed

    def close(self) -> None:
        """Gives the memory back: no placed tensor may be used afterwards."""
        self._pages.clear()


def load_allocator() -> ctypes.CDLL:
    allocator = ctypes.CDLL(None)
    if not hasattr(allocator, "guard_switch"):
        raise SystemExit("guard_pages.py must be run with guard_allocator.so in LD_PRELOAD")
    allocator.guard_blocks.restype = ctypes.c_size_t
    return allocator


ALLOCATOR = load_allocator()


@contextmanager
def guarded_outputs(side: str) -> Iterator[None]:
    """While it lasts, all memory that PyTorch takes for tensors lies at inaccessible pages."""
    if ALLOCATOR.guard_switch(SIDES[side]):
        raise SystemExit("no addresses could be reserved")
    try:
        yield
    finally:
        ALLOCATOR.guard_switch(0)


class Shape(NamedTuple):
    """Of a case: maps [batch, channels, height, width], a second stage for the head, classes."""

    batch: int
    channels: int
    height: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.channels}x{self.height}x{self.width} K={self.classes}"


def laid(x: Tensor, layout: str) -> Tensor:
    """x's values; "cropped" is the lower right of a larger map, without its first row and column."""
    if layout.startswith("cropped"):
        larger = torch.nn.functional.pad(x, (1, 0, 1, 0), value=float("nan"))
        return laid(larger, "channels_last" if layout.endswith("last") else "contiguous")[:, :, 1:, 1:]
    return x.contiguous(memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format)


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(dtype)


# A case is a call of an operator: its tensors (and lists of them) by position, and how it is called with them.
Call = tuple[Callable[..., object], list[object]]


def head_calls(s: Shape, dtype: torch.dtype, layout: str, attention: str, pool: tuple[int, int]) -> Iterator[tuple[str, Call]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    cells, n, k = pool[0] * pool[1], 2, s.classes
    maps = [laid(normal(s.batch, c, s.height, s.width, dtype=dtype), layout) for c in (s.channels, s.channels % 5 + 1)]
    widths = [x.shape[1] * cells for x in maps]
    shape = {"nxn": (n, n), "gated": (n, n), "classwise": (n, k)}.get(attention, (n,))
    offset = {"hard": None, "1xn": (1,), "classwise": (k,)}.get(attention, (n,))
    weight, bias = normal(k, sum(widths), dtype=dtype), normal(n, k, dtype=dtype)
    given = [weight, bias, normal(*shape, dtype=dtype), None if offset is None else normal(*offset, dtype=dtype)]
    branches = attention != "folded"
    if attention == "folded":
        given[1:] = [None, None, normal(k, dtype=dtype)]
    yield "head", (lambda f, *rest: OPS.interflow_head(f, *rest, attention, pool, branches, None), [maps, *given])
    pooled = normal(s.batch, sum(widths), dtype=wide)
    ups = [normal(s.batch, k, dtype=dtype), normal(s.batch, n, k, dtype=dtype) if branches else None]
    call = lambda dy, dz, p, *rest: OPS.interflow_head_backward(dy, dz, p, *rest, attention, widths, [0, 1], branches, branches, branches)  # noqa: E731
    yield "head backward", (call, [*ups, pooled, *given])


def pool_calls(s: Shape, dtype: torch.dtype, layout: str, pool: tuple[int, int]) -> Iterator[tuple[str, Call]]:
    maps = [laid(normal(s.batch, c, s.height, s.width, dtype=dtype), layout) for c in (s.channels, s.channels % 5 + 1)]
    yield "pool", (lambda f: OPS.interflow_pool(f, pool), [maps])


def tap_calls(s: Shape, dtype: torch.dtype, layout: str, max_pool: bool) -> Iterator[tuple[str, Call]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    u = laid(normal(s.batch, s.channels, s.height, s.width, dtype=dtype), layout)
    last = is_channels_last(u)
    shift = normal(s.channels, dtype=dtype if s.width % 2 else torch.float32)
    yield "tap", (lambda u, shift: OPS.stage_tap(u, shift, max_pool, True), [u, shift])
    mask = OPS.stage_tap(u, shift, max_pool, True)[2]
    ups = [laid(normal(s.batch, s.channels, s.height // 2, s.width // 2, dtype=dtype), layout) if max_pool else None, normal(s.batch, s.channels, dtype=wide)]
    yield "tap backward", (lambda *given: OPS.stage_tap_backward(*given, max_pool, last, True), [*ups, mask, Untouched(u)])


def end_calls(s: Shape, dtype: torch.dtype, layout: str, residual: str | None) -> Iterator[tuple[str, Call]]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    draw = lambda how: laid(normal(s.batch, s.channels, s.height, s.width, dtype=dtype), how)  # noqa: E731
    u = draw(layout)
    last = is_channels_last(u)
    shift = normal(s.channels, dtype=dtype if s.width % 2 else torch.float32)
    activation = "none" if s.channels % 4 == 0 else "relu"
    given = [u, shift, None if residual is None else draw(residual)]
    yield "end", (lambda *given: OPS.stage_end(*given, activation), given)
    v = OPS.stage_end(*given, activation)[0]
    ups = [draw(layout), normal(s.batch, s.channels, dtype=wide), v if activation == "relu" else None]
    yield "end backward", (lambda *given: OPS.stage_end_backward(*given, last, True), [*ups, Untouched(u)])


class Untouched(NamedTuple):
    """A tensor that an operator takes for its shape alone: its memory is not to be read at all."""

    like: Tensor


def calls(s: Shape, dtype: torch.dtype, layout: str, draw: random.Random) -> Iterator[tuple[str, Call]]:
    """Of every operator, in modes drawn at random."""
    pool = draw.choice([(1, 1), (1, 1), (2, 3)])
    attention, residual = draw.choice(ATTENTIONS), draw.choice([*LAYOUTS, None])
    yield from ((f"{name} {attention} {pool}", call) for name, call in head_calls(s, dtype, layout, attention, pool))
    yield from ((f"{name} {pool}", call) for name, call in pool_calls(s, dtype, layout, pool))
    yield from tap_calls(s, dtype, layout, draw.random() < 0.75)
    yield from ((f"{name}, residual {residual}", call) for name, call in end_calls(s, dtype, layout, residual))


def on_ordinary(given: object) -> object:
    return given.like if isinstance(given, Untouched) else given


def tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


def check(call: Call, side: str) -> None:
    """One call on guarded memory, and its bits beside those on ordinary memory."""
    function, given = call
    expected = tensors(function(*map(on_ordinary, given)))
    memory = Memory(side)

    def placed(each: object) -> object:
        if isinstance(each, Untouched):
            return memory.place(each.like, readable=False)
        return [memory.place(t) for t in each] if isinstance(each, list) else memory.place(each)  # type: ignore[arg-type]

    arguments = [placed(each) for each in given]
    with guarded_outputs(side):
        found = tensors(function(*arguments))
    for i, (got, want) in enumerate(zip(found, expected, strict=True)):
        assert got.stride() == want.stride(), f"output {i} has strides {got.stride()}, on ordinary memory {want.stride()}"
        assert_same_bits(f"output {i}", got, want)
    del found, arguments
    memory.close()


def shapes(full: bool) -> Iterator[Shape]:
    """channels and widths of 1 to 17: every pair, or each channel with one width."""
    for channels, width in itertools.product(range(1, 18), range(1, 18)):
        if full or width == (channels * 7) % 17 + 1:
            yield Shape(channels % 3 + 1, channels, width * 5 % 7 + 1, width, (channels + 3 * width) % 19 + 1)


def run(full: bool) -> int:
    """The number of calls that were checked."""
    torch.manual_seed(0)
    draw, done = random.Random(0), 0
    for number, (s, dtype, layout) in enumerate(itertools.product(shapes(full), DTYPES, LAYOUTS)):
        if not full and (number + number // 16) % 4:
            continue
        for name, call in calls(s, dtype, layout, draw):
            for side in SIDES:
                print(f"{name} {s} {str(dtype).removeprefix('torch.')} {layout}, page {side}", flush=True)
                check(call, side)
                done += 1
    return done


# --- faults on purpose: that this file sees them ---------------------------------------------------------------------------------
def _read(offset: int, side: str) -> None:
    t = Memory(side).place(torch.ones(3))
    assert t is not None
    ctypes.string_at(t.data_ptr() + offset, 1)


def _write(offset: int, side: str) -> None:
    with guarded_outputs(side):
        t = torch.empty(3)
        ctypes.memset(t.data_ptr() + offset, 0, 1)


def _freed() -> None:
    with guarded_outputs(BEHIND):
        t = torch.zeros(3)
        address = t.data_ptr()
        del t
        ctypes.string_at(address, 1)


FAULTS: dict[str, Callable[[], None]] = {
    "read behind": lambda: _read(12, BEHIND),
    "read before": lambda: _read(-1, BEFORE),
    "write behind": lambda: _write(12, BEHIND),
    "write before": lambda: _write(-1, BEFORE),
    "read of freed memory": _freed,
    "read of what is only a shape": lambda: Memory(BEHIND).place(torch.ones(3), readable=False).sum().item(),  # type: ignore[union-attr]
}


def fate(fault: Callable[[], None]) -> int:
    """The signal that ends a process with this fault; 0 where none does."""
    child = os.fork()
    if child == 0:
        fault()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main() -> None:
    if sys.argv[1] == "faults":
        for name, fault in FAULTS.items():
            print(f"{name}: {fate(fault)}")
        return
    print(f"done: {run(sys.argv[1] == 'full')} calls, {ALLOCATOR.guard_blocks()} guarded blocks of memory")


if __name__ == "__main__":
    main()
