"""The part headline: VGG-16 and VGG-16-BN with Interflow against the plain and the naive network, 224 pixels, bf16, channels_last.

The most telling cell first; each is checked by the gate, timed in turns and written before the next is built. On a CPU tiny networks: a rehearsal.
"""

import gc
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from bench_train_step import case_of
from harness import machine
from harness.case import Case
from harness.profiler import entries, profiled
from harness.run import Session, check, counted, summary
from networks import DIRECTIONS, Cell

from . import inductor
from .command import begin
from .record import Record, machine_line, table

NAMES = ("Interflow fused", "plain", "Interflow naive")
SECONDS = 1.5  # of timing a cell
NEEDED = {False: 6.0, True: 45.0}  # seconds that a cell takes, a guess: eager, compiled
SHOWN = 3  # calls that the profile of a compiled network sees


def cells() -> Iterator[Cell]:
    """By what they tell: the goal of the design is a training step of VGG-16 at B = 32, eager, then compiled; then the larger batch, then batch norm."""
    for model, batch, compiled in (
        ("vgg16", 32, False),
        ("vgg16", 128, False),
        ("vgg16_bn", 32, False),
        ("vgg16", 32, True),
        ("vgg16_bn", 128, False),
        ("vgg16", 128, True),
        ("vgg16_bn", 32, True),
        ("vgg16_bn", 128, True),
    ):
        for direction in DIRECTIONS:
            yield Cell(model, direction, 224, batch, layout="channels_last", dtype="bf16", compiled=compiled, classes=1000)


def rehearsed() -> Iterator[Cell]:
    """One small cell of each kind; a compiled one runs what it was given (TORCHDYNAMO_DISABLE)."""
    tiny = Cell("vgg16", DIRECTIONS[0], 32, 2, width=0.1, layout="channels_last", dtype="bf16", classes=10)
    yield tiny
    yield replace(tiny, model="vgg16_bn", direction=DIRECTIONS[1])
    yield replace(tiny, compiled=True)


def rows_of(case: Case, cell: Cell, session: Session) -> Iterator[dict[str, Any]]:
    """Checks and times a case -> a row for each network, as the benchmarks keep them; a compiled one says what torch.compile did."""
    code = len(inductor.generated())
    check(case)
    texts = [path.read_text() for path in inductor.generated()[code:] if path.exists()]
    samples = session.measure(case, SECONDS * session.scale)
    counts = counted(case, session.device)
    for name, provider in case.providers.items():
        row = summary(case, samples, name, session.device, *counts)
        if cell.compiled:
            found = entries(profiled(provider.call, session.device, SHOWN), session.device, SHOWN)
            row |= {"torch": torch.__version__, "inductor": inductor.told(found, texts)}
        yield row


def measure(record: Record, session: Session, until: float, only: str = "") -> int:
    """Every cell with `only` in its name that the time allows -> how many failed."""
    failed = 0
    for cell in cells() if session.device.type == "cuda" else rehearsed():
        if only not in cell.name:
            continue
        if time.perf_counter() + NEEDED[cell.compiled] > until:
            print(f"{cell.name}: left out, too little time", flush=True)
            record.add({"case": cell.name, "left_out": "too little time was left"})
            continue
        print(f"{cell.name} ...", flush=True)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        begun = time.perf_counter()
        try:
            clocks = machine.gpu_clocks() if session.device.type == "cuda" else {}
            for row in rows_of(case_of(cell, NAMES, session.device), cell, session):
                record.add(row | clocks)
                if row["kind"] == "ours":
                    print("  ".join(line(row)), flush=True)
        except torch.OutOfMemoryError as error:
            record.add({"case": cell.name, "left_out": f"it does not fit into this GPU's memory: {str(error).splitlines()[0]}"})
        except Exception as error:  # a refused or broken cell must not take the others with it
            failed += 1
            traceback.print_exc()
            record.add({"case": cell.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})
        print(f"  {time.perf_counter() - begun:.0f} s", flush=True)
    return failed


def line(row: dict[str, Any]) -> list[str]:
    """A row of the table: of the fused network beside the others."""
    times = [f"{row['speed_up'][name][0]:.3f} [{row['speed_up'][name][1]:.3f}, {row['speed_up'][name][2]:.3f}]" for name in NAMES[1:]]
    goal = "; ".join(f"{g['text']}: {'reached' if g['reached'] else 'MISSED'}" for g in row.get("goals", []))
    compiled = f" by torch {row['torch']}" if "torch" in row else ""
    return [row["case"] + compiled, f"{row['p50_us'] / 1e3:.3f}", f"{row['images_per_s']:.0f}", *times, goal]


def shown(data: dict[str, Any]) -> str:
    """Failures, cells that were left out, the fused networks beside the others, what torch.compile did, the machine."""
    rows = data["rows"]
    said = [f"FAILED {row['case']}: {row['failed']}" for row in rows if "failed" in row]
    said += [f"left out, {row['left_out']}: {row['case']}" for row in rows if "left_out" in row]
    header = ["with Interflow, fused", "ms", "images/s", "plain / fused", "naive / fused", "goal"]
    made = table([line(row) for row in rows if row.get("kind") == "ours"], header)
    compiled = [
        f"torch {row['torch']}, {row['case']}, {row['provider']}: max-pool backward by {row['inductor']['pool_backward']}"
        for row in rows
        if "inductor" in row and row["pass"] == DIRECTIONS[0]
    ]
    return "\n".join(["", *said, made, *compiled, machine_line(data)])


def main(arguments: list[str]) -> int:
    run = begin("headline", __doc__, arguments, budget=180.0)
    if run.rehearsal:
        NEEDED[True] = NEEDED[False] = 0.0
    session = Session(run.device, scale=0.0 if run.rehearsal else 1.0, patience=0.0 if run.rehearsal else 5.0)
    failed = measure(run.record, session, run.until, run.only)
    print(shown(run.record.data), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
