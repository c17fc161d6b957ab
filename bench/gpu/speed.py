"""The part speed: each stage of the tap, each stage end and the head, forward and backward, beside a copy and a read of the same run.

`python -m gpu.speed --help`.

bf16, replayed graphs of at least 20 calls, inputs that no cache holds. The most telling rows first; each is checked before it is timed, written at once
and beside its goal where the design has one. On a CPU tiny maps and no graphs: a rehearsal.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals, machine
from harness.clock import call_turn, graph_turn, synchronize
from harness.copying import COPY_BYTES, DRIVERS, KERNELS, copies
from harness.gate import TOLERANCE, refuse_wrong
from harness.inputs import cold_sets, feature_maps
from harness.roofline import BOUNDARIES, HEAD_STAGES, RESNET_STAGES, EndShape, HeadShape, Map, TapShape, at_pixels
from torch import Tensor

from interflow_kernels import FusedInterflowHead

from .command import begin
from .record import Record, machine_line, table

BF16 = torch.bfloat16
TURNS, MOST_SETS = 9, 64
AWAKE = 0.7  # seconds
tap = torch.ops.interflow_kernels.stage_tap.default
tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
end = torch.ops.interflow_kernels.stage_end.default
end_backward = torch.ops.interflow_kernels.stage_end_backward.default
head_backward = torch.ops.interflow_kernels.interflow_head_backward.default
FORWARD, BACKWARD = "forward", "backward"
WAYS = {FORWARD: "forward keeping masks", BACKWARD: "backward"}  # as goals.GPU_TAP names them


@dataclass(frozen=True)
class Work:
    """One kernel on rotating inputs: what is called, how many input sets, bytes that it cannot do without, and what it gives on set 0 beside what it must."""

    call: Callable[[int], Any]
    sets: int
    bytes: int
    checked: Callable[[], tuple[list[Tensor], list[Tensor]]] | None = None


def seconds(work: Work, device: torch.device) -> float:
    """The median time of a call, after its result was looked at."""
    if work.checked is not None:
        refuse_wrong("ours", *work.checked(), TOLERANCE[BF16])
    turn = graph_turn(work.call, work.sets, device) if device.type == "cuda" else call_turn(work.call, (i % work.sets for i in count()), device)
    return statistics.median(turn() for _ in range(TURNS))


# --- what is timed --------------------------------------------------------------------------------------------------------
def limits(device: torch.device) -> dict[str, Work]:
    """A copy of half a GiB by the driver and one by a kernel, a read of it, and the smallest launch."""
    x = torch.empty((COPY_BYTES if device.type == "cuda" else 1 << 20) // 4, device=device).uniform_()
    y, one = torch.empty_like(x), torch.zeros(1, device=device)
    return {
        **{name: Work(way, 1, 2 * x.nbytes) for name, way in copies(x, y).items()},
        "read": Work(lambda i: x.sum(), 1, x.nbytes),
        "launch": Work(lambda i: one.add_(1), 1, 0),
    }


def tap_work(m: Map, max_pool: bool, batch: int, layout: str, device: torch.device) -> dict[str, Work]:
    """Forward and backward of one boundary."""
    shape = TapShape((m,), (max_pool,), batch, 2)
    sets = min(MOST_SETS, cold_sets(shape.map_bytes(), device))
    channels, height, width = m
    us = [maps[0] for maps in feature_maps((m,), batch, "bf16", layout, sets, device)]
    small = (channels, height // 2, width // 2)
    dms = [maps[0] for maps in feature_maps((small,), batch, "bf16", layout, sets, device, seed=1)] if max_pool else [None] * sets
    shift, dp = torch.randn(channels, device=device, dtype=BF16), torch.randn(batch, channels, device=device)
    masks = [tap(u, shift, max_pool, True)[2] for u in us]
    nhwc = layout == "channels_last"

    def forward() -> tuple[list[Tensor], list[Tensor]]:
        v = F.relu(us[0] + shift[:, None, None])
        found, wanted = tap(us[0], shift, max_pool, True), [v.float().mean((2, 3))]
        return ([found[0]] if max_pool else []) + [found[1]], ([F.max_pool2d(v, 2, 2)] if max_pool else []) + wanted

    def backward() -> tuple[list[Tensor], list[Tensor]]:
        leaf = us[0].detach().requires_grad_()
        v = F.relu(leaf + shift[:, None, None])
        pairs = [(v.float().mean((2, 3)), dp)] + ([(F.max_pool2d(v, 2, 2), dms[0])] if max_pool else [])
        du = torch.autograd.grad([y for y, _ in pairs], leaf, [g for _, g in pairs])[0]
        found = tap_backward(dms[0], dp, masks[0], us[0], max_pool, nhwc, True)
        return [found[0]], [du]

    return {
        FORWARD: Work(lambda i: tap(us[i], shift, max_pool, True), sets, shape.forward_bytes(training=True), forward),
        BACKWARD: Work(lambda i: tap_backward(dms[i], dp, masks[i], us[i], max_pool, nhwc, True), sets, shape.backward_bytes(), backward),
    }


def end_work(m: Map, batch: int, layout: str, device: torch.device) -> dict[str, Work]:
    """Forward and backward of the end of a stage where a shortcut is added, without a shift, as after a norm."""
    shape = EndShape((m,), batch, 2, residual=True, relu=True)
    sets = min(MOST_SETS, cold_sets(shape.map_bytes(), device))
    us, rs, dvs = ([maps[0] for maps in feature_maps((m,), batch, "bf16", layout, sets, device, seed=seed)] for seed in (0, 1, 2))
    dp = torch.randn(batch, m[0], device=device)
    vs = [end(u, None, r, "relu")[0] for u, r in zip(us, rs, strict=True)]
    nhwc = layout == "channels_last"

    def forward() -> tuple[list[Tensor], list[Tensor]]:
        v = F.relu(us[0] + rs[0])
        return [*end(us[0], None, rs[0], "relu")], [v, v.float().mean((2, 3))]

    def backward() -> tuple[list[Tensor], list[Tensor]]:
        leaf = us[0].detach().requires_grad_()
        v = F.relu(leaf + rs[0])
        du = torch.autograd.grad([v, v.float().mean((2, 3))], leaf, [dvs[0], dp])[0]
        return [end_backward(dvs[0], dp, vs[0], us[0], nhwc, False)[0]], [du]

    return {
        FORWARD: Work(lambda i: end(us[i], None, rs[i], "relu"), sets, shape.forward_bytes(), forward),
        BACKWARD: Work(lambda i: end_backward(dvs[i], dp, vs[i], us[i], nhwc, False), sets, shape.backward_bytes(), backward),
    }


def head_work(stages: tuple[Map, ...], batch: int, layout: str, device: torch.device) -> dict[str, Work]:
    """The head on its maps, K = 1000, and its backward, which reads no map."""
    shape = HeadShape(stages, 1000, batch, 2)
    sets = feature_maps(stages, batch, "bf16", layout, min(MOST_SETS, cold_sets(shape.map_bytes(), device)), device)
    torch.manual_seed(0)
    head = FusedInterflowHead([c for c, _, _ in stages], 1000, "nxn").to(device, BF16)
    eager, dy = head.to_eager(), torch.randn(batch, 1000, device=device, dtype=BF16)
    given = [t.detach() for t in (head.weight, head.bias, head.attention_weight)]
    widths, pooled = [c for c, _, _ in stages], torch.randn(batch, shape.width, device=device)
    arguments = (dy, None, pooled, *given, None, "nxn", widths, list(range(len(stages))), True, True, True)
    return {
        FORWARD: Work(lambda i: head(sets[i]), len(sets), shape.forward_bytes(), lambda: ([head(sets[0])], [eager(sets[0])])),
        BACKWARD: Work(lambda i: head_backward(*arguments), 1, shape.backward_bytes()),
    }


# --- the rows, the most telling first -------------------------------------------------------------------------------------
def planned(device: torch.device) -> Iterator[tuple[str, dict[str, Any], Callable[[], dict[str, Work]]]]:
    """(what, about, what builds it), in the order in which the time is spent."""
    order = [(32, "channels_last"), (32, "nchw"), (128, "channels_last"), (128, "nchw"), (8, "channels_last"), (8, "nchw")]
    heads = {32: (32, 1), 128: (128, 256), 8: (8,)}
    for batch, layout in order:
        for b in heads[batch]:
            yield "head", {"batch": b, "layout": layout, "map": "four stages"}, partial(head_work, HEAD_STAGES, b, layout, device)
        for i, m in enumerate(BOUNDARIES):
            about = {"batch": batch, "layout": layout, "map": "x".join(map(str, m))}
            yield "tap", about, partial(tap_work, m, i < len(BOUNDARIES) - 1, batch, layout, device)
        for m in RESNET_STAGES:
            yield "end", {"batch": batch, "layout": layout, "map": "x".join(map(str, m))}, partial(end_work, m, batch, layout, device)


def rehearsed(build: Callable[[], dict[str, Work]]) -> dict[str, Work]:
    """The same work on tiny maps of two images."""
    assert isinstance(build, partial)
    first, *rest = build.args
    tiny = [(8, h, w) for _, h, w in at_pixels(first if isinstance(first[0], tuple) else (first,), 32)]
    rest = [2 if isinstance(x, int) and not isinstance(x, bool) else x for x in rest]
    return build.func(tuple(tiny) if isinstance(first[0], tuple) else tiny[0], *rest)


def goal(what: str, direction: str, about: dict[str, Any]) -> tuple[str, float] | None:
    """The design's share of a copy ("share") or time in microseconds ("us"), or None. The tap's are of all its boundaries together."""
    if what == "tap":
        found = [g for g in goals.GPU_TAP.get((WAYS[direction], about["layout"]), []) if g.unit == "of copy"]
        return ("share", found[0].bound) if found and about["batch"] >= 32 else None
    if what == "end":  # the design has none
        return None
    found = goals.gpu_head(224, about["layout"], about["batch"])[2:] if direction == FORWARD else []
    return ("share" if found[0].unit == "of copy" else "us", found[0].bound) if found else None


def measure(record: Record, device: torch.device, until: float, only: str = "") -> None:
    """Every planned row with `only` in its name until the time is over; the limits anew for each group of rows, since clocks drift."""
    group, copied, totals = None, 0.0, {}
    full = device.type == "cuda"
    awake(device)
    for what, about, build in planned(device):
        name = f"{what} {about['layout']} B={about['batch']} {about['map']}"
        if only not in name:
            continue
        if time.perf_counter() > until:
            record.note(left_out="the time was spent")
            return
        if (what == "head", about["layout"]) != group:
            group = (what == "head", about["layout"])
            copied = measured_limits(record, device)
        print(f"{name} ...", flush=True)
        try:
            works = build() if full else rehearsed(build)
            for direction in (FORWARD, BACKWARD):
                with torch.inference_mode(direction == FORWARD and what == "head"):
                    taken = seconds(works[direction], device)
                row = {"what": what, "pass": direction, **about, "us": 1e6 * taken, "bytes": works[direction].bytes}
                add(record, row, copied, goal(what, direction, about) if full else None)
                if what == "tap":
                    total = totals.setdefault((direction, about["layout"], about["batch"]), [0.0, 0, 0])
                    total[0], total[1], total[2] = total[0] + taken, total[1] + works[direction].bytes, total[2] + 1
                    if total[2] == len(BOUNDARIES):
                        whole = row | {"map": "five boundaries", "us": 1e6 * total[0], "bytes": total[1]}
                        add(record, whole, copied, goal(what, direction, about) if full else None)
            del works
        except (AssertionError, RuntimeError) as error:  # refused by the gate, or it does not fit: the next row
            print(f"FAILED {name}: {error}", flush=True)
            record.add({"what": what, **about, "failed": str(error).splitlines()[0]})
            if "CUDA error" in str(error):
                raise


def measured_limits(record: Record, device: torch.device) -> float:
    """Bytes a second of the faster copy, measured now; copies, read and launch become rows."""
    found = {name: (seconds(work, device), work.bytes) for name, work in limits(device).items()}
    for name, (taken, moved) in found.items():
        record.add(
            {"what": name, "us": 1e6 * taken, "bytes": moved, "gb_per_s": moved / taken / 1e9, **(machine.gpu_clocks() if device.type == "cuda" else {})}
        )
    print("limits: " + ", ".join(f"{name} {t * 1e6:.2f} us, {b / t / 1e9:.0f} GB/s" for name, (t, b) in found.items()), flush=True)
    return max(found[name][1] / found[name][0] for name in (DRIVERS, KERNELS))


def awake(device: torch.device) -> None:
    """Work for as long as an idle GPU takes to raise its clocks; what is measured afterwards keeps them there."""
    size, least = (4096, AWAKE) if device.type == "cuda" else (8, 0.0)
    x = torch.randn(size, size, device=device, dtype=BF16)
    begun = time.perf_counter()
    while True:
        for _ in range(20):
            x @ x
        synchronize(device)
        if time.perf_counter() - begun >= least:
            return


def add(record: Record, row: dict[str, Any], copied: float, aim: tuple[str, float] | None) -> None:
    """The row with its bytes a second, its share of the copy and its goal; printed at once."""
    row |= {"gb_per_s": row["bytes"] / row["us"] / 1e3, "share": row["bytes"] / row["us"] * 1e6 / copied}
    if aim is not None:
        kind, bound = aim
        row |= {
            "goal": f">= {bound:g} of copy" if kind == "share" else f"<= {bound:g} us",
            "reached": row["share"] >= bound if kind == "share" else row["us"] <= bound,
        }
    record.add(row)
    print("  ".join(cells(row)), flush=True)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    name = f"{row['what']} {row['pass']} {row['layout']} B={row['batch']} {row['map']}"
    judged = f"{row['goal']}: {'reached' if row['reached'] else 'MISSED'}" if "goal" in row else ""
    return [name, f"{row['us']:.2f}", f"{row['gb_per_s']:.0f}", f"{row['share']:.2f}", judged]


def shown(data: dict[str, Any]) -> str:
    """Whole boundaries and heads; what failed; the machine."""
    rows = [row for row in data["rows"] if "pass" in row and (row["what"] == "head" or row["map"] == "five boundaries")]
    failed = [f"FAILED {row['what']} {row['layout']} B={row['batch']} {row['map']}: {row['failed']}" for row in data["rows"] if "failed" in row]
    left = [f"left out: {data['left_out']}"] if "left_out" in data else []
    return "\n".join(["", *failed, *left, table([cells(row) for row in rows], ["speed", "us", "GB/s", "of copy", "goal"]), machine_line(data)])


def main(arguments: list[str]) -> int:
    run = begin("speed", __doc__, arguments, budget=60.0)
    measure(run.record, run.device, run.until, run.only)
    print(shown(run.record.data), flush=True)
    return int(any("failed" in row for row in run.record.data["rows"]))  # a miss is no failure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
