"""What the tests of the stage tap share: PyTorch's own composition, and a run of the tap beside it and beside fp64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from interflow_kernels import reference, stage_tap
from interflow_kernels._tap_format import is_channels_last as is_nhwc
from interflow_kernels.testing import TOLERANCE, TapCase, assert_close, assert_same_bits, tap_inputs

raw_tap = torch.ops.interflow_kernels.stage_tap.default
raw_tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
DTYPES = tuple(TOLERANCE)
FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])


def biased(u, shift):
    """u + shift as PyTorch rounds it."""
    return u if shift is None else u + shift.to(u.dtype)[:, None, None]


def composed(u, shift, max_pool=True):
    """PyTorch's own operators, each step in u's dtype -> v, m or None."""
    v = F.relu(biased(u, shift))
    if max_pool and min(u.shape[2:]) > 1:
        return v, F.max_pool2d(v, 2, 2)
    return v, v[:, :, : u.shape[2] // 2, : u.shape[3] // 2] if max_pool else None


def upstreams(case, dtype, seed=3):
    """dm, dp: normally distributed."""
    batch, channels, height, width = case.shape
    generator = torch.Generator().manual_seed(seed)
    dm = torch.randn(batch, channels, height // 2, width // 2, generator=generator, dtype=torch.float64).to(dtype)
    dp = torch.randn(batch, channels, generator=generator, dtype=torch.float64).to(torch.float64 if dtype == torch.float64 else torch.float32)
    return dm if case.max_pool else None, dp


def run(u, shift, max_pool, dm, dp):
    """m, p, du, dshift of the tap; gradients None where there are none."""
    leaves = [u.detach().requires_grad_(), None if shift is None else shift.detach().requires_grad_()]
    m, p = stage_tap(*leaves, max_pool=max_pool)
    pairs = [(out, g) for out, g in ((m, dm), (p, dp)) if g is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t is not None], [g for _, g in pairs])
    return m, p.detach(), grads[0], grads[1] if shift is not None else None


def exact_gradient(u, shift, max_pool, dm, dp):
    """d(u) in fp64 by autograd of the definition, from u + shift as u's dtype rounds it."""
    leaf = biased(u, shift).double().detach().requires_grad_()
    m, p = reference.stage_tap(leaf, None, max_pool)
    pairs = [(out, g.double()) for out, g in ((m, dm), (p, dp)) if g is not None]
    return torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])[0]


def strides_of(like, height, width):
    """Of a dense map in the memory format of `like`."""
    batch, channels = like.shape[:2]
    if is_nhwc(like):
        return torch.empty(batch, height, width, channels).permute(0, 3, 1, 2).stride()
    return torch.empty(batch, channels, height, width).stride()


def check(case, use=("dm", "dp"), inputs=None):
    """Runs the case; compares m to the bit, p and the gradients with fp64, by name."""
    u, shift = tap_inputs(case) if inputs is None else inputs
    dm, dp = upstreams(replace(case, shape=tuple(u.shape)), u.dtype)
    dm, dp = dm if "dm" in use else None, dp if "dp" in use or dm is None else None
    m, p, du, dshift = run(u, shift, case.max_pool, dm, dp)

    v, expected = composed(u, shift, case.max_pool)
    if case.max_pool:
        assert_same_bits("m", m, expected)
        assert m.stride() == strides_of(u, *m.shape[2:])
    else:
        assert m is None
    mean = v.double().mean((2, 3))
    assert_close("p", p, mean, magnitude=mean)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    assert (p.dtype, p.shape, p.is_contiguous()) == (wide, u.shape[:2], True)
    with torch.no_grad():
        for name, a, b in zip("mp", stage_tap(u, shift, max_pool=case.max_pool), (m, p), strict=True):
            assert (a is None and b is None) or torch.equal(a.isnan(), b.isnan()), name
            assert a is None or assert_same_bits(f"{name} of inference", a, b) is None

    wanted = exact_gradient(u, shift, case.max_pool, dm, dp)
    magnitude = exact_gradient(u, shift, case.max_pool, *(None if g is None else g.abs() for g in (dm, dp)))
    assert du.dtype == u.dtype
    assert du.stride() == strides_of(u, *u.shape[2:])
    assert_close("du", du, wanted, magnitude=magnitude)
    if shift is not None:
        assert dshift.dtype == shift.dtype
        assert_close("dshift", dshift, wanted.sum((0, 2, 3)), magnitude=magnitude.sum((0, 2, 3)))


def check_choice(u, shift=None, max_pool=True):
    """m and du to the bit: which element takes the gradient and where it passes, beside PyTorch's autograd in u's own dtype."""
    case = TapCase(tuple(u.shape), u.dtype, max_pool=max_pool)
    dm, dp = upstreams(case, u.dtype)
    both = u.dtype in (torch.float32, torch.float64)  # below, PyTorch rounds the two gradients before it adds them
    for use in ((dm, None), (None, dp), *(((dm, dp),) if both else ())):
        if use == (None, None):
            continue
        m, _, du, _ = run(u, shift, max_pool, *use)
        leaf = u.detach().requires_grad_()
        v, wanted = composed(leaf, shift, max_pool)
        p = v.mean((2, 3), dtype=dp.dtype)
        pairs = [(out, g) for out, g in zip((wanted, p), use, strict=True) if g is not None]
        if max_pool:
            assert_same_bits("m", m, wanted)
        expected = torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])[0]
        assert_same_bits(f"du of {'dm' * (use[0] is not None)}{'dp' * (use[1] is not None)}", du, expected)
