"""The stage end: v and du to the bit beside PyTorch's composition on the CPU, p and dshift beside fp64, for each dtype, layout, form and gradient."""

from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import EndCase, assert_close, assert_same_bits, composed_end, composed_end_gradient, end_inputs, in_layout

from . import Check
from .head import DTYPES, short

end = torch.ops.interflow_kernels.stage_end.default
end_backward = torch.ops.interflow_kernels.stage_end_backward.default
SHAPES = ((2, 19, 9, 13), (2, 64, 16, 16))
LARGER = ((2, 256, 56, 56), (3, 130, 28, 28), (3, 96, 14, 14), (2, 2048, 7, 7), (1, 3, 230, 231))


def checks(device: torch.device) -> Iterator[Check]:
    """Every combination on small maps, then the shapes of ResNet-50's stages."""
    number = 0
    for dtype, layout, activation, residual in product(DTYPES, ("channels_last", "contiguous", "sliced", "cropped"), ("relu", "none"), (True, False)):
        for use, special, shape in product((("dv",), ("dp",), ("dv", "dp")), (False, True), SHAPES):
            number += 1
            case = EndCase(shape, dtype, layout, activation, "none" if special else "fp32", layout if residual else "none", special)
            words = [short(dtype), layout, activation, *["residual"] * residual, "+".join(use), *["special"] * special, "x".join(map(str, shape))]
            yield Check("end " + " ".join(words), partial(check, case, use, device), rehearsed=number % 37 == 1)
    for shape, layout in product(LARGER, ("channels_last", "contiguous")):
        case = EndCase(shape, torch.bfloat16, layout, residual=layout)
        yield Check(f"end {'x'.join(map(str, shape))} {layout}", partial(check, case, ("dv",), device), rehearsed=shape == LARGER[2])


def check(case: EndCase, use: tuple[str, ...], device: torch.device) -> None:
    u, shift, residual = end_inputs(case)
    there, added = (None if t is None else in_layout(t.to(device), case.layout) for t in (u, residual))
    assert there is not None
    v, p = end(there, None if shift is None else shift.to(device), added, case.activation)
    expected = composed_end(u, shift, residual, case.activation)
    assert_same_bits("v", v.cpu(), expected)
    wide = expected.double()
    assert_close("p", p.cpu(), wide.mean((2, 3)), magnitude=wide.abs().mean((2, 3)))

    g = torch.Generator().manual_seed(3)
    dv = torch.randn(u.shape, generator=g).to(u.dtype) if "dv" in use else None
    dp = torch.randn(u.shape[:2], generator=g) if "dp" in use else None
    nhwc = is_channels_last(there)
    given = None if dv is None else in_layout(dv.to(device), "channels_last" if nhwc else "contiguous")
    value = v if case.activation == "relu" else None
    du, dshift = (t.cpu() for t in end_backward(given, None if dp is None else dp.to(device), value, there, nhwc, True))
    if len(use) == 1 or u.dtype == torch.float32:  # else PyTorch rounds each gradient before it adds them
        assert_same_bits("du", du, composed_end_gradient(u, shift, residual, case.activation, dv, dp))
    exact, magnitude = (
        composed_end_gradient(wide, None, None, case.activation, *(None if t is None else f(t.double()) for t in (dv, dp))) for f in (torch.clone, torch.abs)
    )
    assert_close("du", du, exact, magnitude=magnitude)
    assert_close("dshift", dshift, exact.sum((0, 2, 3)), magnitude=magnitude.sum((0, 2, 3)))
