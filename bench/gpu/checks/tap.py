"""The stage tap: m and du to the bit beside PyTorch's composition on the CPU, p and dshift beside fp64, for each dtype, layout, form and gradient."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from interflow_kernels.testing import TapCase, assert_close, assert_same_bits, composed_tap, composed_tap_gradient, in_layout, tap_inputs

from . import Check
from .head import DTYPES, short

tap = torch.ops.interflow_kernels.stage_tap.default
tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
SHAPES = ((2, 19, 9, 13), (2, 64, 16, 16))
LARGER = ((2, 64, 112, 112), (3, 96, 28, 28), (3, 130, 14, 14), (2, 70, 56, 56))


def checks(device: torch.device) -> Iterator[Check]:
    """What PyTorch does here, then every combination on small maps, then the shapes of VGG-16's stages."""
    yield Check("what relu(-0.0) is in PyTorch here", partial(relu_of_minus_zero, device))
    number = 0
    for dtype, layout, max_pool in product(DTYPES, ("channels_last", "contiguous", "sliced", "cropped"), (True, False)):
        for use in (("dm",), ("dp",), ("dm", "dp")) if max_pool else (("dp",),):
            for special, shape in product((False, True), SHAPES):
                number += 1
                case = TapCase(shape, dtype, layout, max_pool, "none" if special else "fp32", special)
                words = [short(dtype), layout, "pooled" if max_pool else "mean", "+".join(use), *["special"] * special, "x".join(map(str, shape))]
                yield Check("tap " + " ".join(words), partial(check, case, use, device), rehearsed=number % 13 == 1)
    for shape, layout in product(LARGER, ("channels_last", "contiguous")):
        case = TapCase(shape, torch.bfloat16, layout)
        yield Check(f"tap {'x'.join(map(str, shape))} {layout}", partial(check, case, ("dm",), device), rehearsed=shape == LARGER[2])


def relu_of_minus_zero(device: torch.device) -> None:
    """Told, not judged: PyTorch's own bits here. m has the CPU's, with -0."""
    kept = bool(torch.signbit(torch.relu(torch.tensor([-0.0], device=device))).item())
    print(f"PyTorch {torch.__version__}: relu(-0.0) on {device.type} is {'-0' if kept else '+0'}", flush=True)


def check(case: TapCase, use: tuple[str, ...], device: torch.device) -> None:
    u, shift = tap_inputs(case)
    there, s = in_layout(u.to(device), case.layout), None if shift is None else shift.to(device)
    m, p, mask = tap(there, s, case.max_pool, True)
    v, expected = composed_tap(u, shift, case.max_pool)
    if expected is not None:
        assert_same_bits("m", m.cpu(), expected)
    mean = v.double().mean((2, 3))
    assert_close("p", p.cpu(), mean, magnitude=mean)

    g = torch.Generator().manual_seed(3)
    batch, channels, height, width = u.shape
    dm = torch.randn(batch, channels, height // 2, width // 2, generator=g).to(u.dtype) if "dm" in use else None
    dp = torch.randn(batch, channels, generator=g) if "dp" in use else None
    nhwc = there.stride(1) == 1 and channels > 1
    given = None if dm is None else in_layout(dm.to(device), "channels_last" if nhwc else "contiguous")
    du, dshift = (t.cpu() for t in tap_backward(given, None if dp is None else dp.to(device), mask, there, case.max_pool, nhwc, True))
    if len(use) == 1 or u.dtype == torch.float32:  # else PyTorch rounds each gradient before it adds them
        assert_same_bits("du", du, composed_tap_gradient(u, shift, case.max_pool, dm, dp))
    rounded = (u if shift is None else u + shift.to(u.dtype)[:, None, None]).double()
    exact, magnitude = (
        composed_tap_gradient(rounded, None, case.max_pool, *(None if t is None else f(t.double()) for t in (dm, dp))) for f in (torch.clone, torch.abs)
    )
    assert_close("du", du, exact, magnitude=magnitude)
    assert_close("dshift", dshift, exact.sum((0, 2, 3)), magnitude=magnitude.sum((0, 2, 3)))
