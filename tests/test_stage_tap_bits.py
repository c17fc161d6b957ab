"""The stage tap's bits: over runs, threads, batches and instruction sets; and what the eager backend gives."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from stage_tap_cases import DTYPES, FORMS, check, check_choice, is_nhwc, raw_tap, raw_tap_backward, run, upstreams

from interflow_kernels import backend
from interflow_kernels.testing import LAYOUTS, TapCase, assert_close, in_layout, tap_inputs

pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: the threads of PyTorch's own operators would mostly wait for each other


# --- bits -------------------------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_bits_repeat_over_runs_and_threads(layout, dtype, max_pool, threads):
    u, shift = torch.randn(5, 72, 41, 39).to(dtype), torch.randn(72)
    u = in_layout(u, layout)
    dm, dp = upstreams(TapCase(tuple(u.shape), max_pool=max_pool), dtype)
    threads(1)
    first = run(u, shift, max_pool, dm, dp)
    for repetition in range(8):
        threads(2 - repetition % 2)
        for name, a, b in zip(("m", "p", "du", "dshift"), run(u, shift, max_pool, dm, dp), first, strict=True):
            assert (a is None and b is None) or torch.equal(a, b), (name, repetition)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_an_image_does_not_depend_on_its_batch(layout, dtype, max_pool):
    u, shift = torch.randn(9, 40, 29, 30).to(dtype), torch.randn(40)
    dm, dp = upstreams(TapCase(tuple(u.shape), max_pool=max_pool), dtype)

    def part(chosen):
        return run(in_layout(u[chosen], layout), shift, max_pool, dm[chosen] if max_pool else None, dp[chosen])[:3]

    whole = part(torch.arange(9))
    for chosen in ([0], [8], [3, 8, 0, 1, 2], [8, 7]):
        for name, a, b in zip(("m", "p", "du"), whole, part(torch.tensor(chosen)), strict=True):
            assert (a is None and b is None) or torch.equal(a[chosen], b), name


# --- either instruction set, in memory that malloc fills ------------------------------------------------------------------------
MATRIX = """
import sys
sys.path.insert(0, {folder!r})
from test_stage_tap_bits import digest_of_everything, torch
torch.set_num_threads(1)
print(digest_of_everything())
"""


def digest_of_everything():
    """Checks sizes around every vector and part, and gives one digest of all that forward and backward return, mask included."""
    digest = hashlib.sha256()
    for dtype in DTYPES:
        for layout in LAYOUTS:
            for shape in ((2, 19, 9, 13), (2, 3, 4, 38), (1, 515, 2, 3), (2, 17, 33, 31), (1, 9, 1, 5), (1, 2, 3, 515)):
                for max_pool in (True, False):
                    case = TapCase(shape, dtype, layout, max_pool, special=True)
                    check(case)
                    u, shift = tap_inputs(case)
                    check_choice(u, shift, max_pool)
                    m, p, mask = raw_tap(u, shift, max_pool, True)
                    dm, dp = upstreams(case, dtype)
                    du, dshift = raw_tap_backward(dm, dp, mask, u, max_pool, is_nhwc(u), True)
                    for t in (m, p, mask, du, dshift):
                        t = torch.where(t.isnan(), 7, t).contiguous()  # the sign of a NaN may differ
                        digest.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


# --- the other backend ------------------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_backend_gives_the_same(dtype, max_pool):
    for layout in ("contiguous", "channels_last"):
        case = TapCase(dtype=dtype, layout=layout, max_pool=max_pool)
        inputs, (dm, dp) = tap_inputs(case), upstreams(case, dtype)
        native = run(*inputs, max_pool, dm, dp)
        with backend("eager"):
            eager = run(*inputs, max_pool, dm, dp)
        for name, a, b in zip(("m", "p", "du", "dshift"), native, eager, strict=True):
            if b is None:
                assert a is None
                continue
            assert a.dtype == b.dtype, name
            coarse = {torch.bfloat16: 2e-2, torch.float16: 2e-3}.get(dtype)  # eager rounds dm and dp before it adds them
            assert_close(name, a, b, None if name in "mp" else coarse)
