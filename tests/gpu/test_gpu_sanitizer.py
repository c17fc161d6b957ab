"""NVIDIA's compute-sanitizer over small shapes: no access outside of tensors, no race, no barrier missed, nothing read that nobody wrote."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")

END = """
sys.stdout.flush()
os._exit(0)  # under the tool, threads that PyTorch leaves running abort an interpreter that ends by itself; leaks are not asked for
"""

RUN = (
    """
import os, sys
sys.path[:0] = sys.argv[1:]
import torch
from on_device import head_bits, head_on, misaligned, tap_bits, tap_on, tap_upstream, upstream
from interflow_kernels import FusedInterflowHead, backend
from interflow_kernels.testing import HeadCase, TapCase
with backend("native"):
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("contiguous", "channels_last"):
            for attention, batch, classes in (("nxn", 3, 10), ("gated", 17, 65)):
                case = HeadCase(batch, ((17, 9, 5), (64, 28, 28)), classes, attention, layout=layout, dtype=dtype)
                plain, maps = head_on(case, "cuda")
                head_bits(FusedInterflowHead.from_eager(plain), [maps[0], misaligned(maps[1])], *upstream(case, "cuda"))
            for max_pool in (True, False):
                u, shift = tap_on(TapCase((3, 24, 29, 31), dtype, layout, max_pool), "cuda")
                tap_bits(u, shift, max_pool, *tap_upstream(u, max_pool))
    torch.cuda.synchronize()
print("ran")
"""
    + END
)

WRONG = (
    """
import os, sys
import torch
from torch.cuda import _compile_kernel
write = _compile_kernel('extern "C" __global__ void interflow_write(float* x, int at) { x[at] = 1.0f; }', "interflow_write")
x = torch.zeros(64, device="cuda")
write((1, 1, 1), (1, 1, 1), (x, 64))  # one element behind its end
try:
    torch.cuda.synchronize()
except RuntimeError:
    pass  # the tool may end the context
print("ran")
"""
    + END
)


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next((str(p) for p in [Path("/usr/local/cuda/bin/compute-sanitizer")] if p.exists()), None)


def command(program: str, tool: str, options: str, code: str = RUN) -> list[str]:
    """The tool over the program. options: what `compute-sanitizer --help` says.

    memcheck, racecheck and synccheck judge our kernels alone. initcheck must see every kernel: of those that it is told to leave out it does not
    see the writes either, and takes what they wrote for uninitialised. Failed calls of CUDA are PyTorch's business: it asks, and reads the answer.
    """
    ours = ["--kernel-regex", "kns=interflow"] if tool != "initcheck" and "--kernel-regex" in options else []
    quiet = ["--report-api-errors", "no"] if "--report-api-errors" in options else []
    here = Path(__file__).parent
    return [program, "--tool", tool, "--error-exitcode", "99", *quiet, *ours, sys.executable, "-c", code, str(here)]


def judged(tool: str, code: str) -> subprocess.CompletedProcess:
    """The program under the tool."""
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer, neither in PATH nor in /usr/local/cuda/bin")
    options = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own, whose end the tool knows
    done = subprocess.run(command(program, tool, options, code), capture_output=True, text=True, env=environment)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device")
    return done


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer(tool):
    done = judged(tool, RUN)
    assert done.returncode == 0 and "ran" in done.stdout, (done.stdout + done.stderr)[-4000:]
    assert re.search(r"SUMMARY: 0 (errors|hazards)", done.stdout), done.stdout[-4000:]  # the tool came to its own end


@pytest.mark.gpu
@pytest.mark.slow
def test_memcheck_finds_a_write_outside():
    """It reports what a kernel did, though the program leaves without ending the interpreter."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        pytest.skip("torch before 2.9 compiles no kernel at run time")
    done = judged("memcheck", WRONG)
    assert done.returncode != 0 and "Invalid __global__ write" in done.stdout, (done.stdout + done.stderr)[-4000:]


@pytest.mark.parametrize("tool", TOOLS)
def test_what_the_tool_is_told(tool):
    told = command("compute-sanitizer", tool, "--tool --kernel-regex --report-api-errors")
    assert told[told.index("--report-api-errors") + 1] == "no"
    assert ("kns=interflow" in told) == (tool != "initcheck")  # it would take what other kernels wrote for uninitialised
    assert not {"--kernel-regex", "--report-api-errors"} & set(command("compute-sanitizer", tool, "--tool"))  # an older one knows neither


def test_the_program_runs_where_the_kernels_do():
    """On the CPU: no typing error waits for the tool, and what was printed arrives."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", ""), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout == "ran\n", done.stderr[-3000:]
