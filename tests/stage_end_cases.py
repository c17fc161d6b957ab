"""What the tests of the stage end share: a run of it beside PyTorch's own composition and beside fp64."""

from dataclasses import replace

import pytest
import torch
from stage_tap_cases import DTYPES, is_nhwc, strides_of

from interflow_kernels import reference, stage_end
from interflow_kernels.testing import EndCase, assert_close, assert_same_bits, composed_end, composed_end_gradient, end_inputs, exact_end_gradient

raw_end = torch.ops.interflow_kernels.stage_end.default
raw_end_backward = torch.ops.interflow_kernels.stage_end_backward.default
ACTIVATIONS = pytest.mark.parametrize("activation", reference.ACTIVATIONS)
NAMES = ("v", "p", "du", "dshift", "dresidual")
USES = (("dv",), ("dp",), ("dv", "dp"))

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "NAMES",
    "USES",
    "assert_all_same",
    "check",
    "is_nhwc",
    "raw_end",
    "raw_end_backward",
    "run",
    "strides_of",
    "upstreams",
]


def upstreams(shape, dtype, seed=3):
    """dv, dp: normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    dv = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dp = torch.randn(shape[:2], generator=generator, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return dv, dp


def run(u, shift, residual, activation, dv, dp, call=stage_end):
    """v, p, du, dshift, dresidual; gradients None where there are none."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (u, shift, residual)]
    v, p = call(*leaves, activation=activation)
    pairs = [(out, g) for out, g in ((v, dv), (p, dp)) if g is not None]
    grads = iter(torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t is not None], [g for _, g in pairs]))
    return v.detach(), p.detach(), *(None if t is None else next(grads) for t in leaves)


def assert_all_same(what, actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert_same_bits(f"{name} {what}", a, e)


def check(case, use=("dv", "dp"), inputs=None):
    """Runs the case; v and, where PyTorch's steps are the same ones, du to the bit; p and the gradients beside fp64, by name."""
    u, shift, residual = end_inputs(case) if inputs is None else inputs
    dv, dp = upstreams(tuple(u.shape), u.dtype)
    dv, dp = dv if "dv" in use else None, dp if "dp" in use else None
    v, p, du, dshift, dresidual = run(u, shift, residual, case.activation, dv, dp)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32

    expected = composed_end(u, shift, residual, case.activation)
    assert_same_bits("v", v, expected)
    assert v.stride() == strides_of(u, *u.shape[2:])
    mean = expected.double().mean((2, 3))
    magnitude = expected.double().abs().mean((2, 3))
    assert_close("p", p, mean, magnitude=magnitude)
    assert (p.dtype, p.shape, p.is_contiguous()) == (wide, u.shape[:2], True)
    with torch.no_grad():
        for name, a, b in zip("vp", stage_end(u, shift, residual, activation=case.activation), (v, p), strict=True):
            assert_same_bits(f"{name} of inference", a, b)

    if len(use) == 1 or u.dtype in (torch.float32, torch.float64):  # below, PyTorch rounds the two gradients before it adds them
        assert_same_bits("du", du, composed_end_gradient(u, shift, residual, case.activation, dv, dp))
    wanted, size = (exact_end_gradient(expected, case.activation, *(None if g is None else f(g) for g in (dv, dp))) for f in (lambda g: g, torch.abs))
    assert (du.dtype, du.stride()) == (u.dtype, strides_of(u, *u.shape[2:]))
    assert_close("du", du, wanted, magnitude=size)
    if shift is not None:
        assert dshift.dtype == shift.dtype
        assert_close("dshift", dshift, wanted.sum((0, 2, 3)), magnitude=size.sum((0, 2, 3)))
    if residual is not None:
        assert dresidual.dtype == residual.dtype
        assert_same_bits("dresidual", dresidual, du.to(residual.dtype))


def check_all(case, **changes):
    """Every upstream gradient, alone and together."""
    for use in USES:
        check(replace(case, **changes), use)


def small(layout="contiguous", **rest):
    return EndCase((2, 5, 4, 3), layout=layout, **rest)
