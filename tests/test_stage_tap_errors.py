"""Bad input to the stage tap: one sentence, and never a crash."""

import subprocess
import sys

import pytest
import torch

from interflow_kernels import StageTap, backend, stage_tap
from interflow_kernels.testing import Counted

FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])


U, S = torch.randn(2, 4, 6, 5), torch.randn(4)
BAD = [
    ((U[0], S), ValueError, ("u must be [B, C, H, W]", "(4, 6, 5)")),
    ((U[None], S), ValueError, ("u must be [B, C, H, W]", "(1, 2, 4, 6, 5)")),
    ((torch.tensor(1.0),), ValueError, ("u must be [B, C, H, W]", "()")),
    ((U.long(), None), TypeError, ("u must be fp32, fp64, bf16 or fp16", "torch.int64")),
    ((U.bool(), None), TypeError, ("u must be fp32, fp64, bf16 or fp16", "torch.bool")),
    ((U.to(torch.complex64), None), TypeError, ("u must be fp32, fp64, bf16 or fp16", "complex64")),
    ((U.to(torch.float8_e4m3fn), None), TypeError, ("u must be fp32, fp64, bf16 or fp16", "float8_e4m3fn")),
    (([[1.0]], None), TypeError, ("u must be a tensor", "list")),
    ((None, None), TypeError, ("u must be a tensor", "NoneType")),
    ((U[:, :, :0], S), ValueError, ("u must have H and W of at least 1", "(2, 4, 0, 5)")),
    ((U[..., :0], S), ValueError, ("u must have H and W of at least 1", "(2, 4, 6, 0)")),
    ((U, S[:3]), ValueError, ("shift must be [C]", "4 channels", "(3,)")),
    ((U, S[None]), ValueError, ("shift must be [C]", "4 channels", "(1, 4)")),
    ((U, torch.tensor(1.0)), ValueError, ("shift must be [C]", "()")),
    ((U, S.double()), TypeError, ("shift must have the dtype of u, torch.float32", "torch.float64")),
    ((U, S.bfloat16()), TypeError, ("shift must have the dtype of u, torch.float32", "torch.bfloat16")),
    ((U.bfloat16(), S.half()), TypeError, ("shift must have the dtype of u, torch.bfloat16", "fp32", "torch.float16")),
    ((U, S.long()), TypeError, ("shift must have the dtype of u", "torch.int64")),
    ((U, 1.0), TypeError, ("shift must be a tensor or None", "float")),
    ((U, [0.0] * 4), TypeError, ("shift must be a tensor or None", "list")),
    ((U, S.to("meta")), ValueError, ("shift must be on the device of u, cpu", "meta")),
]


@FORMS
@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize(("arguments", "kind", "parts"), BAD, ids=lambda v: v[0] if isinstance(v, tuple) and isinstance(v[0], str) else "")
def test_bad_input(arguments, kind, parts, name, max_pool):
    for call in (lambda *a: stage_tap(*a, max_pool=max_pool), StageTap(max_pool)):
        with backend(name), Counted() as counted, pytest.raises(kind) as error:
            call(*arguments)
        text = str(error.value)
        assert "\n" not in text
        for part in parts:
            assert part in text, f"{part!r} is not in {text!r}"
        assert counted.operators == []
    with Counted() as counted:
        stage_tap(U, S)
    assert counted.operators  # the counter counts


FUZZ = """
import torch
import interflow_kernels
tap = torch.ops.interflow_kernels.stage_tap
back = torch.ops.interflow_kernels.stage_tap_backward
count = 0

def refuses(call, good, bad):
    global count
    call(**good)
    for name, values in bad.items():
        for value in values:
            try:
                call(**{**good, **(value if isinstance(value, dict) else {name: value})})
            except RuntimeError as error:
                assert "stage_tap" in str(error), error
                count += 1
            else:
                raise SystemExit(f"{name} = {value} did not raise")

u, shift = torch.randn(2, 4, 6, 5), torch.randn(4)
with torch.inference_mode():
    refuses(tap, dict(u=u, shift=shift, max_pool=True, need_mask=True), dict(
        u=[u[0], u[None], torch.tensor(1.0), u.long(), u.to(torch.complex64), u.to(torch.float8_e4m3fn), u[:, :, :0], u[..., :0], u[:, :3], u[:0, :, :0]],
        shift=[shift[:3], shift[None], torch.tensor(1.0), shift.double(), shift.half(), shift.long()]))
    for max_pool in (True, False):
        for channels_last in (True, False):
            x = u.contiguous(memory_format=torch.channels_last) if channels_last else u
            m, p, mask = tap(x, shift, max_pool, True)
            refuses(back, dict(dm=m if max_pool else None, dp=p, mask=mask, like=u, max_pool=max_pool, channels_last=channels_last, need_shift=True), dict(
                dm=[m[:1], m[0], m[:, :, :2], m.double(), m.bfloat16(), m.long(), torch.randn(2, 4, 6, 5), torch.tensor(1.0)] if max_pool else [],
                dp=[p[:1], p[0], p[:, :3], p.double(), p.bfloat16(), torch.randn(4, 2), torch.tensor(1.0)],
                mask=[mask[:-1], mask[:0], mask[:, None], mask.repeat(2), mask.to(torch.int8), mask.float(),
                      mask.repeat_interleave(2)[::2], mask.bool()],
                like=[u[0], u[:, :, :0], u[..., :0], u.long(), u[:, :3], u[:1], u[:, :, :2], u.double()]))
    # Sizes whose products do not fit into 64 bits, or whose results fit into no memory: stride 0 makes them of one element.
    one, none = torch.zeros(()), torch.empty(0, dtype=torch.uint8)
    for shape in ((1, 1, 2**31, 2**31), (2**31, 2**31, 1, 1), (1, 2**61, 1, 1), (1, 2, 2**30, 2**30), (2**40, 3, 3, 3)):
        for max_pool in (True, False):
            for channels_last in (True, False):
                try:
                    back(None, None, none, one.expand(shape), max_pool, channels_last, True)
                except RuntimeError:
                    count += 1
                else:
                    raise SystemExit(f"{shape} did not raise")
            try:
                tap(one.expand(shape), None, max_pool, True)
            except RuntimeError:
                count += 1
            else:
                raise SystemExit(f"{shape} did not raise")
    for shape in ((0, 1, 2**32, 2**32), (0, 2**62, 1, 1), (2, 0, 3, 3), (0, 0, 2**31, 2**33)):  # empty ones: no crash, whatever comes
        for max_pool in (True, False):
            for channels_last in (True, False):
                like = one.expand(shape)
                for call in (lambda: back(None, None, none, like, max_pool, channels_last, False), lambda: tap(like, None, max_pool, True)):
                    try:
                        call()
                    except RuntimeError:
                        pass
print(count)
"""


def test_malformed_raw_calls_raise_and_never_crash():
    done = subprocess.run([sys.executable, "-c", FUZZ], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout) > 100
