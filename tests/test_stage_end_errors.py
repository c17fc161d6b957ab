"""Bad input to the stage end: one sentence, and never a crash."""

import subprocess
import sys

import pytest
import torch

from interflow_kernels import StageEnd, backend, stage_end
from interflow_kernels.testing import Counted

U, S, R = torch.randn(2, 4, 6, 5), torch.randn(4), torch.randn(2, 4, 6, 5)
BAD = [
    ((U[0], S), ValueError, ("u must be [B, C, H, W]", "(4, 6, 5)")),
    ((U.long(), None), TypeError, ("u must be fp32, fp64, bf16 or fp16", "torch.int64")),
    (([[1.0]], None), TypeError, ("u must be a tensor", "list")),
    ((U[:, :, :0], S), ValueError, ("u must have H and W of at least 1", "(2, 4, 0, 5)")),
    ((U, S[:3]), ValueError, ("shift must be [C]", "4 channels", "(3,)")),
    ((U, S.double()), TypeError, ("shift must have the dtype of u, torch.float32", "torch.float64")),
    ((U, S.to("meta")), ValueError, ("shift must be on the device of u, cpu", "meta")),
    ((U, S, R[:1]), ValueError, ("residual must have the shape of u, (2, 4, 6, 5)", "(1, 4, 6, 5)")),
    ((U, S, R[:, :, :, :1]), ValueError, ("residual must have the shape of u, (2, 4, 6, 5)", "(2, 4, 6, 1)")),
    ((U, S, R[0]), ValueError, ("residual must have the shape of u, (2, 4, 6, 5)", "(4, 6, 5)")),
    ((U, None, R.long()), TypeError, ("residual must be fp32, fp64, bf16 or fp16", "torch.int64")),
    ((U, None, R.to(torch.complex64)), TypeError, ("residual must be fp32, fp64, bf16 or fp16", "complex64")),
    ((U, None, R.to_sparse()), TypeError, ("residual must be a dense tensor", "to_dense()")),
    ((U, None, 1.0), TypeError, ("residual must be a tensor or None", "float")),
    ((U, None, R.to("meta")), ValueError, ("residual must be on the device of u, cpu", "meta")),
]


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("name", ["auto", "eager"])
@pytest.mark.parametrize(("arguments", "kind", "parts"), BAD, ids=lambda v: v[0] if isinstance(v, tuple) and isinstance(v[0], str) else "")
def test_bad_input(arguments, kind, parts, name, activation):
    for call in (lambda *a: stage_end(*a, activation=activation), StageEnd(activation)):
        with backend(name), Counted() as counted, pytest.raises(kind) as error:
            call(*arguments)
        text = str(error.value)
        assert "\n" not in text
        for part in parts:
            assert part in text, f"{part!r} is not in {text!r}"
        assert counted.operators == []


@pytest.mark.parametrize("value", ["gelu", "ReLU", "", None, True, 1, ["relu"], torch.nn.ReLU()])
def test_bad_activation(value):
    for call in (lambda: stage_end(U, activation=value), lambda: StageEnd(value)):
        with pytest.raises(ValueError, match="^activation must be one of 'relu', 'none', got "):
            call()


FUZZ = """
import torch
import interflow_kernels
end = torch.ops.interflow_kernels.stage_end
back = torch.ops.interflow_kernels.stage_end_backward
count = 0

def refuses(call, good, bad):
    global count
    call(**good)
    for name, values in bad.items():
        for value in values:
            try:
                call(**{**good, name: value})
            except RuntimeError as error:
                assert "stage_end" in str(error), error
                count += 1
            else:
                raise SystemExit(f"{name} = {value} did not raise")

u, shift, residual = torch.randn(2, 4, 6, 5), torch.randn(4), torch.randn(2, 4, 6, 5)
maps = lambda t: [t[:1], t[0], t[:, :, :2], t.double(), t.bfloat16(), t.long(), torch.tensor(1.0), t[None], t[:, :3]]
with torch.inference_mode():
    refuses(end, dict(u=u, shift=shift, residual=residual, activation="relu"), dict(
        u=[u[0], u[None], torch.tensor(1.0), u.long(), u.to(torch.complex64), u.to(torch.float8_e4m3fn), u[:, :, :0], u[..., :0], u[:, :3], u[:0, :, :0]],
        shift=[shift[:3], shift[None], torch.tensor(1.0), shift.double(), shift.half(), shift.long()], residual=maps(residual),
        activation=["gelu", "", "RELU"]))
    for channels_last in (True, False):
        v, p = end(u.contiguous(memory_format=torch.channels_last) if channels_last else u, shift, None, "relu")
        for value in (v, None):
            refuses(back, dict(dv=v, dp=p, v=value, like=u, channels_last=channels_last, need_shift=True), dict(
                dv=maps(v), dp=[p[:1], p[0], p[:, :3], p.double(), p.bfloat16(), torch.randn(4, 2), torch.tensor(1.0)], v=maps(v),
                like=[u[0], u[:, :, :0], u[..., :0], u.long(), u[:, :3], u[:1], u[:, :, :2], u.double()]))
    # Sizes whose products do not fit into 64 bits, or whose results fit into no memory: stride 0 makes them of one element.
    one = torch.zeros(())
    for shape in ((1, 1, 2**31, 2**31), (2**31, 2**31, 1, 1), (1, 2**61, 1, 1), (1, 2, 2**30, 2**30), (2**40, 3, 3, 3)):
        large = one.expand(shape)
        for call in (lambda: end(large, None, None, "relu"), lambda: end(large, None, large, "none"),
                     *(lambda b=b: back(large, None, large, large, b, True) for b in (True, False)), lambda: back(None, None, None, large, True, True)):
            try:
                call()
            except RuntimeError:
                count += 1
            else:
                raise SystemExit(f"{shape} did not raise")
    for shape in ((0, 1, 2**32, 2**32), (0, 2**62, 1, 1), (2, 0, 3, 3), (0, 0, 2**31, 2**33)):  # empty ones: no crash, whatever comes
        like = one.expand(shape)
        calls = lambda: back(like, None, None, like, True, False), lambda: back(None, None, like, like, False, False), lambda: end(like, None, like, "relu")
        for call in calls:
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


@pytest.mark.parametrize("kind", ["sparse", "quantized", "meta"])
def test_tensors_that_no_kernel_reads(kind):
    wrong = {"sparse": lambda t: t.to_sparse(), "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "meta": lambda t: t.to("meta")}[kind](
        R
    )
    for call in (
        lambda: torch.ops.interflow_kernels.stage_end(U, S, wrong, "relu"),
        lambda: torch.ops.interflow_kernels.stage_end_backward(wrong, None, None, U, False, True),
        lambda: torch.ops.interflow_kernels.stage_end_backward(None, None, wrong, U, False, True),
    ):
        with pytest.raises(RuntimeError, match="^stage_end(_backward)?: "):
            call()
