"""Where the time of whole networks goes: VGG-16 plain, with Interflow in plain PyTorch and fused; a training step and an inference; by torch.profiler.

OUT gets profile.json, all that was measured, and profile.md, the page made of it. `make profile-page FROM=OUT` makes the page in docs/ of it.
"""

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from gpu import inductor
from harness import machine
from harness.clock import call_turn
from harness.profiler import device_events, entries, profiled
from harness.stats import quantile
from networks import DIRECTIONS, Cell, Network, build
from pages.profile import FILE, markdown

STARTED = time.perf_counter()
SHOWN = ("plain", "Interflow naive", "Interflow fused")
GPU = Cell("vgg16", DIRECTIONS[0], 224, 32, layout="channels_last", dtype="bf16", classes=1000)
CPU = Cell("vgg16", DIRECTIONS[0], 32, 64)
CALLS, TURNS = 5, 9
FAILED = "it failed, see the log"
EAGER, COMPILING = 6.0, 60.0  # seconds, a guess, that three networks take


def profiles(cell: Cell, device: torch.device, compiled: bool, deadline: float | None, missing: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Of each network: eager first, then compiled where it is asked for. `missing` says why others are left out: no time, or a failure."""
    for way, direction in itertools.product((False, True) if compiled else (False,), DIRECTIONS):
        wanted = replace(cell, direction=direction, compiled=way)
        if deadline is not None and time.perf_counter() + (COMPILING if way else EAGER) > deadline:
            missing[wanted.name] = "too little time was left"
            continue
        try:
            yield from side_by_side(build(wanted, SHOWN, device), device)
        except Exception:
            missing[wanted.name] = FAILED
            print(f"FAILED {wanted.name}")
            traceback.print_exc()


def side_by_side(networks: dict[str, Network], device: torch.device) -> Iterator[dict[str, Any]]:
    """Of each network what every kernel or operator takes of a call, how many launches, and the call by the clock; the networks take turns.

    On a GPU the profile is the mean of several calls. On a CPU it is one of several calls, that whose sum is the median: there what others do to a
    call is larger than what its operators differ by.
    """
    # a turn calls its network first, so that nothing is compiled or chosen under the profiler
    code = len(inductor.generated())
    ways = {name: call_turn(network.call, itertools.repeat(0), device) for name, network in networks.items()}
    sessions, calls = (1, CALLS) if device.type == "cuda" else (TURNS, 1)
    texts = [path.read_text() for path in inductor.generated()[code:]]
    clock, found = [], []
    for i in range(TURNS):
        clock.append({name: turn() for name, turn in ways.items()})
        if i < sessions:
            found.append({name: profiled(network.call, device, calls) for name, network in networks.items()})
    for name, network in networks.items():
        measured = sorted((entries(session[name], device, calls) for session in found), key=lambda kernels: sum(kernel["us"] for kernel in kernels))
        yield {
            "network": name,
            "direction": network.cell.direction,
            "compiled": network.cell.compiled,
            "clock_us": round(1e6 * quantile([turns[name] for turns in clock], 0.5), 1),
            "launches": len(device_events(found[0][name])) / calls,
            "entries": measured[sessions // 2],
            **({"inductor": inductor.told(measured[sessions // 2], texts)} if network.cell.compiled else {}),
        }


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where profile.json and profile.md go")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--compiled", action="store_true", help="torch.compile's networks too")
    parser.add_argument("--budget", type=float, default=None, help="seconds after which no further network is begun")
    for key, kind in (("model", str), ("pixels", int), ("batch", int), ("width", float), ("dtype", str), ("layout", str), ("classes", int)):
        parser.add_argument(f"--{key}", type=kind, default=None, help=f"default: {getattr(CPU, key)}, on a GPU {getattr(GPU, key)}")
    given = parser.parse_args(arguments)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    cell = GPU if device.type == "cuda" else CPU
    cell = replace(cell, **{key: getattr(given, key) for key in asdict(cell) if getattr(given, key, None)})
    machine.wait_for_quiet(5.0)
    start, others = time.perf_counter(), machine.others_seconds()
    missing: dict[str, str] = {}
    found = list(profiles(cell, device, given.compiled, None if given.budget is None else STARTED + given.budget, missing))
    spent = ((machine.others_seconds() or 0.0) - (others or 0.0)) / (time.perf_counter() - start)
    data = {
        "machine": machine.describe(device),
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "settings": {**{key: value for key, value in asdict(cell).items() if key not in ("direction", "compiled", "graph")}, "calls": CALLS, "turns": TURNS},
        "others_cores": round(max(0.0, spent), 2),
        "profiles": found,
        "missing": missing,
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / FILE).write_text(json.dumps(data, indent=1) + "\n")
    (given.out / "profile.md").write_text(markdown(data, FILE))
    print(f"{given.out / FILE}\n{given.out / 'profile.md'}")
    for name, reason in missing.items():
        print(f"left out, {reason}: {name}")
    return int(FAILED in missing.values())


def commit() -> str:
    """Of the repository, ten digits; "unknown" without git."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout[:10]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
