"""The stage end's bits: over runs, threads, batches and instruction sets."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from stage_end_cases import ACTIVATIONS, DTYPES, assert_all_same, check, is_nhwc, raw_end, raw_end_backward, run, upstreams

from interflow_kernels.testing import LAYOUTS, EndCase, end_inputs, in_layout

pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: the threads of PyTorch's own operators would mostly wait for each other


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_bits_repeat_over_runs_and_threads(layout, dtype, activation, threads):
    u, shift, residual = torch.randn(5, 72, 41, 39).to(dtype), torch.randn(72), torch.randn(5, 72, 41, 39).to(dtype)
    u = in_layout(u, layout)
    upstream = upstreams(tuple(u.shape), dtype)
    threads(1)
    first = run(u, shift, residual, activation, *upstream)
    for repetition in range(6):
        threads(2 - repetition % 2)
        assert_all_same(f"of run {repetition}", run(u, shift, residual, activation, *upstream), first)


@ACTIVATIONS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_an_image_does_not_depend_on_its_batch(layout, dtype, activation):
    u, shift, residual = torch.randn(9, 40, 29, 30).to(dtype), torch.randn(40), torch.randn(9, 40, 29, 30).to(dtype)
    dv, dp = upstreams(tuple(u.shape), dtype)

    def part(chosen):
        v, p, du, _, dresidual = run(in_layout(u[chosen], layout), shift, residual[chosen], activation, dv[chosen], dp[chosen])
        return v, p, du, None, dresidual

    whole = part(torch.arange(9))
    for chosen in ([0], [8], [3, 8, 0, 1, 2], [8, 7]):
        assert_all_same(f"of images {chosen}", [None if t is None else t[chosen] for t in whole], part(torch.tensor(chosen)))


# --- either instruction set, in memory that malloc fills ------------------------------------------------------------------------
MATRIX = """
import sys
sys.path.insert(0, {folder!r})
from test_stage_end_bits import digest_of_everything, torch
torch.set_num_threads(1)
print(digest_of_everything())
"""


def digest_of_everything():
    """Checks sizes around every vector and part, and gives one digest of all that forward and backward return."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for shape in ((2, 19, 9, 13), (2, 3, 4, 38), (1, 515, 2, 3), (2, 17, 33, 31), (1, 9, 1, 5), (1, 2, 3, 515)):
                for activation, residual in (("relu", layout), ("relu", "none"), ("none", "contiguous")):
                    case = EndCase(shape, dtype, layout, activation, residual=residual, special=True)
                    check(case)
                    inputs = end_inputs(case)
                    v, p = raw_end(*inputs, activation)
                    dv, dp = upstreams(shape, dtype)
                    backward = raw_end_backward(dv, dp, v if activation == "relu" else None, v, is_nhwc(inputs[0]), True)
                    for t in (v, p, *backward):
                        t = torch.where(t.isnan(), 7, t).contiguous()  # the sign of a NaN may differ
                        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.mark.slow
def test_instruction_sets_agree_and_every_byte_is_written():
    digests = {}
    for isa, fill in (("baseline", "1"), ("", "165")):
        # glibc fills what malloc gives with the complement of this byte, so what nobody wrote differs between the runs.
        filled = dict(MALLOC_PERTURB_=fill, MALLOC_MMAP_MAX_="0", GLIBC_TUNABLES="glibc.malloc.tcache_count=0")
        code = MATRIX.format(folder=os.path.dirname(__file__))
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "INTERFLOW_CPU_ISA": isa, **filled}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        digests[isa] = done.stdout.strip()
    assert digests["baseline"] == digests[""]
