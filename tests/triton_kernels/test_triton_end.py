"""The stage end's Triton kernels: v and du to the bit, p and the sums beside fp64."""

import os
import warnings

import pytest
import torch
from example_count import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_end_cases import ACTIVATIONS, USES, raw_end, raw_end_backward, upstreams

from interflow_kernels import stage_end
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import (
    LAYOUTS,
    EndCase,
    assert_close,
    assert_same_bits,
    composed_end,
    composed_end_gradient,
    end_inputs,
    exact_end_gradient,
    in_layout,
)

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # hypothesis mixes badly with the fixture of this name
EXAMPLES = examples(300 if DEVICE == "cuda" else 25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("v", "p", "du", "dshift", "dresidual")
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


def there(t, device):
    return None if t is None else torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()).to(device).as_strided(t.shape, t.stride(), t.storage_offset())


def run(inputs, activation, dv, dp, device):
    """v, p, du, dshift, dresidual on the CPU; gradients None where there are none."""
    leaves = [None if t is None else there(t, device).requires_grad_() for t in inputs]
    v, p = stage_end(*leaves, activation=activation)
    pairs = [(out, there(g, device)) for out, g in ((v, dv), (p, dp)) if g is not None]
    grads = iter(torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t is not None], [g for _, g in pairs]))
    found = v.detach(), p.detach(), *(None if t is None else next(grads) for t in leaves)
    return [None if t is None else t.cpu() for t in found]


def check(case, device, use=("dv", "dp"), seed=0):
    inputs = u, shift, residual = end_inputs(case, seed)
    dv, dp = upstreams(case.shape, case.dtype)
    dv, dp = dv if "dv" in use else None, dp if "dp" in use else None
    v, p, du, dshift, dresidual = run(inputs, case.activation, dv, dp, device)
    expected = composed_end(u, shift, residual, case.activation)
    assert_same_bits("v", v, expected)
    assert_close("p", p, expected.double().mean((2, 3)), magnitude=expected.double().abs().mean((2, 3)))
    if len(use) == 1 or u.dtype == torch.float32:
        assert_same_bits("du", du, composed_end_gradient(u, shift, residual, case.activation, dv, dp))
    wanted, size = (exact_end_gradient(expected, case.activation, *(None if g is None else f(g) for g in (dv, dp))) for f in (lambda g: g, torch.abs))
    assert_close("du", du, wanted, magnitude=size)
    if shift is not None:
        assert_close("dshift", dshift, wanted.sum((0, 2, 3)), magnitude=size.sum((0, 2, 3)))
    if residual is not None:
        assert_same_bits("dresidual", dresidual, du)
    last = is_channels_last(u)
    if u.shape[1] > 1:
        assert v.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        assert du.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@ACTIVATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_shifts(dtype, layout, activation, device):
    for shift, residual in (("none", "none"), ("own", layout), ("fp32", "contiguous"), ("strided", "channels_last")):
        check(EndCase(dtype=dtype, layout=layout, activation=activation, shift=shift, residual=residual, special=shift != "own"), device)


@pytest.mark.parametrize("use", USES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_each_gradient_may_be_missing(layout, use, device):
    for dtype in DTYPES:
        for activation in ("relu", "none"):
            check(EndCase(dtype=dtype, layout=layout, activation=activation, special=True), device, use)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(dtype, layout, device):
    for shape in ((1, 1, 1, 1), (2, 8, 1, 1), (1, 3, 1, 7), (2, 9, 7, 7), (1, 70, 3, 2), (1, 5, 14, 14), (1, 2, 33, 31), (1, 1, 1, 515)):
        check(EndCase(shape, dtype, layout, residual=layout, special=True), device)


def test_parts_of_an_image_meet(device):
    for dtype in (torch.float32, torch.bfloat16):
        check(EndCase((2, 40, 56, 57), dtype, "channels_last", residual="none"), device)
        check(EndCase((1, 8, 200, 60), dtype, "channels_last", residual="channels_last"), device)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 17), st.integers(1, 17)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    residual=st.sampled_from(("none", *LAYOUTS)),
    activation=st.sampled_from(("relu", "none")),
    use=st.sampled_from(USES),
    special=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, layout, residual, activation, use, special, seed):
    check(EndCase(shape, dtype, layout, activation, residual=residual, special=special), DEVICE, use, seed)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_image_does_not_depend_on_its_batch(layout, device):
    u, shift, residual = torch.randn(5, 20, 15, 14).bfloat16(), torch.randn(20), torch.randn(5, 20, 15, 14).bfloat16()
    dv, dp = upstreams((5, 20, 15, 14), torch.bfloat16)
    part = lambda c: run((in_layout(u[c], layout), shift, residual[c]), "relu", dv[c], dp[c], device)  # noqa: E731
    whole = part(torch.arange(5))
    for chosen in ([0], [4, 2, 0]):
        for i in (0, 1, 2, 4):
            assert_same_bits(f"{NAMES[i]} of images {chosen}", part(torch.tensor(chosen))[i], whole[i][chosen])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_upstream_gradients_do_not_matter(layout, device):
    inputs = end_inputs(EndCase(layout=layout))
    dv, dp = upstreams((2, 19, 9, 13), torch.float32)
    expected = run(inputs, "relu", dv, dp, device)
    for other in ("channels_last", "cropped", "sliced", "permuted"):
        for name, a, b in zip(NAMES, run(inputs, "relu", in_layout(dv, other), dp.t().contiguous().t(), device), expected, strict=True):
            assert_same_bits(f"{name} of dv that is {other}", a, b)
    one, p = dv[:1, :1, :1, :1].expand_as(dv), dp[:1, :1].expand_as(dp)
    for name, a, b in zip(NAMES, run(inputs, "relu", one, p, device), run(inputs, "relu", one.contiguous(), p.contiguous(), device), strict=True):
        assert_same_bits(name, a, b)


def test_nothing_to_do_and_nothing_needed(device):
    u = torch.randn(2, 3, 4, 5, device=device)
    v, p = raw_end(u, None, None, "relu")
    assert not any(g.any() for g in raw_end_backward(None, None, v, u, False, True))
    assert raw_end_backward(v, p, v, u, False, False)[1].shape == (0,)
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        empty = torch.empty(shape, device=device)
        v, p = raw_end(empty, None, empty, "relu")
        assert (v.shape, p.shape) == (shape, shape[:2])
        assert raw_end_backward(v, p, v, empty, False, True)[1].tolist() == [0.0] * shape[1]


def test_errors(device):
    u = torch.randn(2, 3, 4, 5, device=device)
    for message, call in {
        r"stage_end: the Triton kernels take u in fp32, bf16 or fp16": lambda: raw_end(u.double(), None, None, "relu"),
        r"stage_end: activation must be 'relu' or 'none', got 'gelu'": lambda: raw_end(u, None, None, "gelu"),
        r"stage_end: residual must be \[2, 3, 4, 5\], got": lambda: raw_end(u, None, u[:1], "relu"),
        r"stage_end: residual must be torch.float32, got": lambda: raw_end(u, None, u.half(), "relu"),
        r"stage_end_backward: dv must be \[2, 3, 4, 5\], got": lambda: raw_end_backward(u[:1], None, None, u, False, True),
        r"stage_end_backward: dp must be torch.float32, got": lambda: raw_end_backward(None, u[:, :, 0, 0].half(), None, u, False, True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()
