"""The process that makes the calls: `python -m tests.fuzz.child TARGET SEED FIRST COUNT FOLDER`; what it finds goes into files as it goes along."""

import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import ends, modules, pool, targets
from .oracle import Call, complaint, difference
from .values import Random

TARGETS: dict[str, Callable[[Random], Call]] = {
    "interflow_head": targets.draw_interflow_head,
    "stage_tap": targets.draw_stage_tap,
    "raw_interflow_head": targets.draw_raw_interflow_head,
    "raw_interflow_head_backward": targets.draw_raw_interflow_head_backward,
    "raw_interflow_pool": pool.draw_raw_interflow_pool,
    "raw_stage_tap": targets.draw_raw_stage_tap,
    "raw_stage_tap_backward": targets.draw_raw_stage_tap_backward,
    "stage_end": ends.draw_stage_end,
    "raw_stage_end": ends.draw_raw_stage_end,
    "raw_stage_end_backward": ends.draw_raw_stage_end_backward,
    "head_modules": modules.draw_head_modules,
    "other_modules": modules.draw_other_modules,
}
SLOW = 5.0  # seconds of this thread's own time that a call of these sizes must not take
MEMORY = 12 << 30  # bytes of addresses: what asks for more fails here and does not take the machine


def told(value: Any) -> str:
    """An argument for a report: of tensors what matters, not the numbers."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout != torch.strided:
            return f"{value.dtype} {value.layout}{' nested' if value.is_nested else ''}"
        return f"{str(value.dtype)[6:]}{list(value.shape)} strides {value.stride()}{' meta' if value.is_meta else ''}{' grad' if value.requires_grad else ''}"
    if isinstance(value, (list, tuple)) and len(value) <= 16:
        return "[" + ", ".join(map(told, value)) + "]"
    return repr(value)[:200]


def draw(target: str, seed: int, number: int) -> Call:
    """The call of that number; torch's own generator is set too."""
    r = Random(f"{seed} {target} {number}")
    torch.manual_seed(r.getrandbits(60))
    return TARGETS[target](r)


def judge(call: Call) -> tuple[str | None, str, float]:
    """(what is wrong or None, "returned" or "refused", seconds) of a call."""
    begin = time.thread_time()
    try:
        results = call.run()
    except Exception as error:
        seconds = time.thread_time() - begin
        wrong = complaint(error)
        if wrong is None and not call.broken and not str(error).startswith("backend "):
            wrong = f"arguments that fit were refused: {error}"
        return wrong, "refused", seconds
    seconds = time.thread_time() - begin
    if seconds > SLOW:
        return f"took {seconds:.1f} s", "returned", seconds
    if not any(t is not None and not t.is_meta for t in results.values()):
        return None, "returned", seconds
    try:
        expected = call.expect()
    except Exception as error:
        return f"a result where the definition refuses: {type(error).__name__}: {error}", "returned", seconds
    return difference(results, expected), "returned", seconds


def main(target: str, seed: int, first: int, count: int, folder: Path) -> None:
    """Writes number and outcome of every call to `progress`, and every finding as a line of JSON to `findings`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(2 if first // 1000 % 2 else 1)
    with (folder / "progress").open("a", buffering=1) as progress, (folder / "findings").open("a", buffering=1) as findings:
        for number in range(first, first + count):
            progress.write(f"{number} begun\n")
            try:
                call = draw(target, seed, number)
            except Exception as error:
                findings.write(
                    json.dumps({"target": target, "number": number, "wrong": f"the drawer failed: {type(error).__name__}: {error}", "arguments": {}}) + "\n"
                )
                continue
            wrong, outcome, seconds = judge(call)
            progress.write(f"{number} {outcome} {'broken' if call.broken else 'whole'} {seconds:.4f}\n")
            if wrong is not None:
                arguments = {name: told(value) for name, value in call.arguments.items()}
                findings.write(json.dumps({"target": target, "number": number, "wrong": wrong, "broken": call.broken, "arguments": arguments}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
