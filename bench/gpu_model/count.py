"""Counts instructions of the CUDA kernels' main loops in their machine code, for the model of time: counts.json.

    PYTHONPATH=bench:tests python -m gpu_model.count build/cuda-test/cuda     # the folder of object files that tests/test_cuda_sass.py builds

A loop's count is that of the way through the code from the first load of its longest batch of loads back to it: at each branch the way on, and where
that does not come back, the shortest way. So it is what a warp issues for one round, or a little less.
"""

import argparse
import json
import re
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from cuda_code import demangled, disassembler, functions  # noqa: E402
from cuda_sass import Code  # noqa: E402

COUNTS = Path(__file__).with_name("counts.json")
ARCHITECTURE = "90a"
LOOPS = {
    # name: file, kernel (demangled), loads of its batch, how many of them
    "head pool, bf16 by 16 bytes": ("interflow_head_forward", r"forward_kernel<__nv_bfloat16>", r"LDG.*\.NA\..*128.*", 16),
    "tap forward NHWC": ("stage_tap_forward", r"tap_pixels<__nv_bfloat16, true, true, true>", r"LDG.*\.NA\..*128.*", 4),
    "tap forward NCHW": ("stage_tap_forward", r"tap_planes<__nv_bfloat16, true, \(interflow::TapPath\)0, true>", r"LDG.*\.NA\..*128.*", 4),
    "tap backward NHWC": ("stage_tap_backward", r"tap_pixels_backward<__nv_bfloat16, true, true>", r"LDG.*\.NA\..*", 2),
    "tap backward NCHW": ("stage_tap_backward", r"tap_planes_backward<__nv_bfloat16, true, \(interflow::TapPath\)0>", r"LDG.*\.NA\..*", 4),
}


def straight(code: Code, start: int) -> int | None:
    """Instructions from `start` back to it: backward branches are taken, forward ones not."""
    i = start
    for count in range(1, len(code.code) + 1):
        on = code.following[i]
        if not on:
            return None
        i = min(on)
        if i == start:
            return count
    return None


def shortest(code: Code, start: int) -> int | None:
    """Instructions of the shortest way from `start` back to it."""
    waiting, far = deque([start]), {start: 0}
    while waiting:
        i = waiting.popleft()
        for j in code.following[i]:
            if j == start:
                return far[i] + 1
            if j not in far:
                far[j] = far[i] + 1
                waiting.append(j)
    return None


def round_of(code: Code, pattern: str, count: int) -> int:
    """Instructions of a round of the loop whose batch has `count` loads that match."""
    compiled = re.compile(pattern)
    for i, x in enumerate(code.code):
        if compiled.fullmatch(x.opcode) and len(code.longest_batch(i, compiled)) == count and (found := straight(code, i) or shortest(code, i)):
            return found
    raise SystemExit(f"no loop with a batch of {count} loads {pattern}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the object files of csrc/*/cuda/*.cu are")
    folder, program = parser.parse_args().folder, disassembler()
    if program is None:
        raise SystemExit("no cuobjdump, neither of the toolkit nor of triton")
    counts: dict[str, int] = {}
    for stem in dict.fromkeys(stem for stem, *_ in LOOPS.values()):
        (binary,) = [*folder.glob(f"{stem}.o"), *folder.glob(f"{stem}.cubin")][:1]
        for architecture, name, code in functions(program, binary):
            for loop, (of, kernel, pattern, count) in LOOPS.items():
                if of == stem and architecture == ARCHITECTURE and re.search(kernel, demangled([name])[name]):
                    counts[loop] = round_of(Code(code), pattern, count)
    if missing := LOOPS.keys() - counts.keys():
        raise SystemExit(f"not found for sm_{ARCHITECTURE}: {', '.join(sorted(missing))}")
    COUNTS.write_text(json.dumps({"architecture": f"sm_{ARCHITECTURE}", "instructions": {k: counts[k] for k in LOOPS}}, indent=2) + "\n")
    print(COUNTS.read_text(), end="")


if __name__ == "__main__":
    main()
