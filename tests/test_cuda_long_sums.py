"""Long sums of the CUDA head, in the host emulation: of large maps and of large batches, as exact as eager PyTorch's or better.

Constant inputs are what a chain of additions is worst at: it rounds each time the same way.
"""

import cuda_emulation
import pytest
import torch
from cuda_emulation import emulated

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

STEP = 2.0**-23  # of fp32: what eager's lucky results are allowed to differ by
NAMES = ("weight", "bias", "attention_weight", "attention_bias")
KINDS = ("constant", "nearly constant", "random")


@pytest.fixture(scope="module")
def library():
    return cuda_emulation.load(cuda_emulation.operator_sources())


def numbers(kind: str, *shape: int, each: int) -> torch.Tensor:
    """fp32, `each` leading dimensions with a number of their own."""
    generator = torch.Generator().manual_seed(len(shape))
    level = torch.rand(*shape[:each], *(1 for _ in shape[each:]), generator=generator) + 0.3
    if kind == "random":
        return torch.rand(shape, generator=generator)
    return (level + (1e-6 * torch.randn(shape, generator=generator) if kind == "nearly constant" else 0)).expand(shape).contiguous()


def worst(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest relative error."""
    return ((actual.double() - exact).abs() / exact.abs()).max().item()


def no_worse(name: str, actual: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor) -> None:
    ours, theirs = worst(actual, exact), worst(eager, exact)
    assert ours <= max(2 * theirs, STEP), f"{name}: relative error {ours:.2e}, eager has {theirs:.2e}"


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("side", [112, 1024])
def test_means_of_large_maps(library, side, layout):
    format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    for kind in KINDS:
        x = numbers(kind, 1, 4, side, side, each=2).contiguous(memory_format=format)
        with emulated(library, 7, 1):
            pooled = library.ops.interflow_head([x], torch.ones(1, 4), None, None, None, "folded", [1, 1], False, None)[2]
        no_worse(f"mean of {kind} maps", pooled, x.mean((2, 3)), x.double().mean((2, 3)))


@pytest.mark.parametrize("attention", ["classwise", "nxn", "gated"])
@pytest.mark.parametrize("kind", ["constant", "random"])
def test_gradients_of_8192_images(library, kind, attention):
    batch, widths, classes = 8192, [8, 4], 3
    n = len(widths)
    pooled, weight = numbers(kind, sum(widths), batch, each=1).t().contiguous(), torch.rand(classes, sum(widths)) + 0.5
    bias = torch.rand(n, classes) + 0.5
    shape = {"classwise": (n, classes), "nxn": (n, n), "gated": (n, n)}[attention]
    attention_weight = torch.rand(shape, generator=torch.Generator().manual_seed(2)) + 0.1
    attention_bias = torch.rand(n, generator=torch.Generator().manual_seed(3)) if attention == "gated" else None
    dy = numbers(kind, classes, batch, each=1).t().contiguous()

    def by_eager(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        p = pooled.to(dtype)
        leaves = [None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for t in (weight, bias, attention_weight, attention_bias)]
        w, b, a, c = leaves
        z = torch.stack([x @ v.t() + s for x, v, s in zip(p.split(widths, 1), w.split(widths, 1), b, strict=True)], 1)
        if attention == "gated":
            y = (torch.softmax(torch.einsum("ij,bjk->bik", a, z) + c[:, None], 1) * z).sum(1)
        elif attention == "nxn":
            y = torch.einsum("ji,bik->bk", a, z)
        else:
            y = (a * z).sum(1)
        y.backward(dy.to(dtype))
        return {name: t.grad for name, t in zip(NAMES, leaves, strict=True) if t is not None}

    with emulated(library, 7, 1):
        grads = library.ops.interflow_head_backward(dy, None, pooled, weight, bias, attention_weight, attention_bias, attention, widths, [], True, True, True)[
            1:
        ]
    eager, exact = by_eager(torch.float32), by_eager(torch.float64)
    for name, grad in zip(NAMES, grads, strict=True):
        if name in eager:
            no_worse(f"{name} of {kind} images", grad, eager[name], exact[name])
