"""NVIDIA's compute-sanitizer over small shapes: no access outside of tensors, no race, no barrier missed, nothing read that nobody wrote."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

RUN = """
import sys
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


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or next((str(p) for p in [Path("/usr/local/cuda/bin/compute-sanitizer")] if p.exists()), None)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck", "initcheck"])
def test_sanitizer(tool):
    program = sanitizer()
    if program is None:
        pytest.skip("no compute-sanitizer, neither in PATH nor in /usr/local/cuda/bin")
    options = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    ours = ["--kernel-regex", "kns=interflow"] if "--kernel-regex" in options else []  # PyTorch's own kernels are not ours to judge
    here = str(Path(__file__).parent)
    command = [program, "--tool", tool, "--error-exitcode", "99", *ours, sys.executable, "-c", RUN, here]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor an allocation of its own, whose end the tool knows
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device")
    assert done.returncode == 0 and "ran" in done.stdout, (done.stdout + done.stderr)[-4000:]
