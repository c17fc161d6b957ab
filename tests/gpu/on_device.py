"""Cases on a device, beside fp64 and beside PyTorch's own operators on the CPU."""

import copy

import torch

from interflow_kernels import FusedInterflowHead, stage_tap
from interflow_kernels.reference import pooled_stage
from interflow_kernels.testing import (
    HeadCase,
    TapCase,
    assert_close,
    assert_same_bits,
    composed_tap,
    composed_tap_gradient,
    gradients,
    head_inputs,
    in_layout,
    magnitudes,
    tap_inputs,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
raw_head = torch.ops.interflow_kernels.interflow_head.default
raw_head_backward = torch.ops.interflow_kernels.interflow_head_backward.default
raw_tap = torch.ops.interflow_kernels.stage_tap.default


def misaligned(x, by=1):
    """The same numbers and strides, from an address that is `by` elements past an aligned one."""
    room = x.new_empty(x.untyped_storage().nbytes() // x.itemsize + by)
    shifted = room.as_strided(x.shape, x.stride(), by)
    shifted.copy_(x)
    return shifted


# --- head ---------------------------------------------------------------------------------------------------------------
def head_on(case: HeadCase, device, seed=0):
    """The plain head, and features in the case's layout, on the device."""
    contiguous = head_inputs(HeadCase(case.batch, case.maps, dtype=case.dtype), seed)
    return case.head().to(device), [in_layout(x.to(device), case.layout) for x in contiguous]


def upstream(case: HeadCase, device, use=("y", "branches"), batch=None):
    """dy [B, K], dbranches [B, n, K]."""
    g = torch.Generator().manual_seed(2)
    n, k, batch = len(case.maps), case.classes, case.batch if batch is None else batch
    dy, dz = (torch.randn(shape, generator=g, dtype=torch.float64).to(device, case.dtype) for shape in ((batch, k), (batch, n, k)))
    return dy if "y" in use else None, dz if "branches" in use else None


def check_head(case: HeadCase, device, features=None, use=("y", "branches")) -> None:
    """Pooled values, outputs and every gradient by name, beside fp64 on the same device."""
    plain, maps = head_on(case, device)
    features = maps if features is None else features
    fused, exact = FusedInterflowHead.from_eager(plain), copy.deepcopy(plain).double()
    dy, dz = upstream(case, device, use)
    outputs, grads = gradients(fused, features, dy, dz)
    wanted, wanted_grads = gradients(exact, [x.double() for x in features], dy, dz)
    magnitude = magnitudes(plain, features, dy, dz)
    pooled = [torch.cat([pooled_stage(f(x.double()), case.pool_size) for x in features], 1) for f in (torch.abs, lambda x: x)]
    got = raw_head(features, fused.weight, None, None, None, "folded", case.pool_size, False, None)[2]
    assert_close("pooled", got, pooled[1], magnitude=pooled[0])
    for name, expected in wanted.items():
        assert_close(name, outputs[name], expected, magnitude=magnitude[name])
    for name, expected in wanted_grads.items():
        actual = grads[name]
        if actual is None or expected is None:
            assert expected is None or not expected.any(), f"{name}: no gradient"
            continue
        assert_close(name, actual, expected, magnitude=magnitude[name])


def head_bits(head, features, dy, dz):
    """Every output and gradient."""
    outputs, grads = gradients(head, features, dy, dz)
    return {**outputs, **{name: g for name, g in grads.items() if g is not None}}


def assert_equal_bits(a, b):
    for name, value in a.items():
        assert_same_bits(name, value, b[name])


# --- tap ----------------------------------------------------------------------------------------------------------------
def tap_on(case: TapCase, device, seed=0):
    """u in the case's layout, and shift, on the device."""
    u, shift = tap_inputs(TapCase(case.shape, case.dtype, "contiguous", case.max_pool, case.shift, case.special), seed)
    return in_layout(u.to(device), case.layout), None if shift is None else shift.to(device)


def tap_upstream(u, max_pool):
    """dm, dp."""
    batch, channels, height, width = u.shape
    g = torch.Generator().manual_seed(3)
    dm, dp = (torch.randn(shape, generator=g).to(u.device) for shape in ((batch, channels, height // 2, width // 2), (batch, channels)))
    return dm.to(u.dtype) if max_pool else None, dp


def tap_bits(u, shift, max_pool, dm, dp):
    """m, p, du, dshift of the tap, those that there are."""
    leaves = [t.detach().requires_grad_() for t in (u, shift) if t is not None]
    m, p = stage_tap(leaves[0], leaves[1] if shift is not None else None, max_pool=max_pool)
    pairs = [(out, g) for out, g in ((m, dm), (p, dp)) if out is not None and g is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs])
    found = {"m": m, "p": p, "du": grads[0], "dshift": grads[1] if shift is not None else None}
    return {name: t.detach() for name, t in found.items() if t is not None}


def check_tap(u, shift, max_pool) -> None:
    """m and du to the bit beside PyTorch's composition on the CPU; p and dshift beside fp64."""
    there, dm, dp = (u, shift), *tap_upstream(u, max_pool)
    u, shift = u.cpu(), None if shift is None else shift.cpu()
    v, m = composed_tap(u, shift, max_pool)
    mean = v.double().mean((2, 3))
    uses = [(None, dp), *([(dm, None)] if max_pool else [])]
    if u.dtype == torch.float32 and max_pool:  # below, PyTorch rounds the two gradients before it adds them
        uses.append((dm, dp))
    for use in uses:
        got = {name: t.cpu() for name, t in tap_bits(*there, max_pool, *use).items()}
        use = [None if g is None else g.cpu() for g in use]
        if m is not None:
            assert_same_bits("m", got["m"], m)
        assert_same_bits("du", got["du"], composed_tap_gradient(u, shift, max_pool, *use))
        assert_close("p", got["p"], mean, magnitude=mean)
        if shift is not None:
            exact = exact_gradient(u, shift, max_pool, *use)
            magnitude = exact_gradient(u, shift, max_pool, *(None if g is None else g.abs() for g in use))
            assert_close("dshift", got["dshift"], exact.sum((0, 2, 3)), magnitude=magnitude.sum((0, 2, 3)))


def exact_gradient(u, shift, max_pool, dm, dp):
    """du in fp64, from u + shift as u's dtype rounds it; all on the CPU."""
    rounded = (u + shift.to(u.dtype)[:, None, None]).double()
    return composed_tap_gradient(rounded, None, max_pool, *(None if g is None else g.double() for g in (dm, dp)))
