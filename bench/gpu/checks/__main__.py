"""One group of checks in a process of its own: a line of JSON before and after each check, so that whoever listens knows what hangs.

    {"about": {...}}                     the machine, once
    {"begin": NAME}
    {"end": NAME, "state": "ok" | "failed" | "skipped", "seconds": S, "text": "..."}
    {"done": COUNT}                      the last line; without it the process died

Exit status 3 where the GPU's context is lost: nothing after that could be believed.
"""

import argparse
import importlib
import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import torch
from harness.clock import synchronize
from harness.machine import describe

from interflow_kernels import backend

from . import Check, Skipped

GROUPS = ("head", "tap", "end", "launches", "triton", "large")
LOST = ("CUDA error", "illegal memory access", "unspecified launch failure", "device-side assert")


def checks_of(group: str, device: torch.device) -> list[Check]:
    """All of a group in the order they run; on a CPU those that are rehearsed."""
    module = importlib.import_module(f".{group}", __package__)
    return [check for check in module.checks(device) if device.type == "cuda" or check.rehearsed]


def say(**line: Any) -> None:
    print(json.dumps(line), flush=True)


def judged(check: Check, device: torch.device) -> bool:
    """Runs one check and says how it ended; True where the GPU can be used further."""
    say(begin=check.name)
    start, state, text, usable = time.perf_counter(), "ok", "", True
    try:
        check.run()
        synchronize(device)
    except Skipped as reason:
        state, text = "skipped", str(reason)
    except Exception as error:  # whatever it is, the next check shall run
        state, text = "failed", f"{type(error).__name__}: {error}"
        usable = not any(sign in str(error) for sign in LOST)
    say(end=check.name, state=state, seconds=round(time.perf_counter() - start, 3), text=text[:600])
    return usable


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--skip", type=int, default=0, help="begin behind so many checks")
    parser.add_argument("--only", default="", help="checks whose name contains this text")
    given = parser.parse_args(arguments)
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    chosen = [check for check in checks_of(given.group, device) if given.only in check.name]
    with backend("triton" if given.group == "triton" else "native") if chosen else nullcontext():
        say(about=describe(device), count=len(chosen))
        for check in chosen[given.skip :]:
            if not judged(check, device):
                return 3
    say(done=len(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
