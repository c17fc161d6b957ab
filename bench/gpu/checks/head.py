"""The head: outputs and every gradient by name beside fp64 on the CPU, for each dtype, layout, attention and size of tile."""

import copy
from collections.abc import Iterator
from functools import partial

import torch

from interflow_kernels import FusedInterflowHead, InterflowHead
from interflow_kernels.testing import ATTENTIONS, HeadCase, assert_close, assert_same_bits, gradients, head_inputs, in_layout, magnitudes

from . import Check

DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def checks(device: torch.device) -> Iterator[Check]:
    """Small first, then classes and batches beyond a tile, then maps in parts, then adaptive windows."""
    full = device.type == "cuda"
    for dtype in DTYPES:
        for layout in ("channels_last", "contiguous", "sliced"):
            case = HeadCase(3, dtype=dtype, layout=layout)
            yield Check(f"head small {short(dtype)} {layout}", partial(check, case, device))
    for attention in ATTENTIONS:
        for classes, batch in ((10, 17), (65, 33)):
            case = HeadCase(batch, ((64, 28, 28), (40, 7, 7)), classes, attention, layout="channels_last", dtype=torch.bfloat16)
            yield Check(f"head {attention} K={classes} B={batch}", partial(check, case, device), rehearsed=batch == 17)
    maps = ((128, 56, 56), (256, 28, 28), (512, 14, 14)) if full else ((64, 40, 40), (72, 6, 6))
    for dtype in (torch.bfloat16, torch.float32):
        for layout in ("channels_last", "contiguous"):
            yield Check(f"head in parts {short(dtype)} {layout}", partial(check, HeadCase(2, maps, 200, layout=layout, dtype=dtype), device))
    yield Check("head pool 2x2", partial(check, HeadCase(pool_size=(2, 2), dtype=torch.bfloat16), device))
    yield Check("head empty batch", partial(check, HeadCase(batch=0), device))
    for layout in ("channels_last", "contiguous"):
        yield Check(f"pool alone {layout}", partial(check_pool, HeadCase(2, maps, layout=layout, dtype=torch.bfloat16), device))
        yield Check(f"head with norm {layout}", partial(check_norm, HeadCase(17, ((64, 28, 28), (40, 7, 7)), 10, layout=layout), device))


def check_pool(case: HeadCase, device: torch.device) -> None:
    """interflow_pool's bits are those of the head's own pooled values."""
    maps = [in_layout(x.to(device), case.layout) for x in head_inputs(case)]
    weight = torch.zeros(3, sum(c for c, _, _ in case.maps), device=device)
    ops = torch.ops.interflow_kernels
    assert_same_bits("pooled", ops.interflow_pool(maps, [1, 1]), ops.interflow_head(maps, weight, None, None, None, "folded", [1, 1], False, None)[2])


def check_norm(case: HeadCase, device: torch.device) -> None:
    """A head with a norm, in training: outputs, statistics and every gradient by name."""
    torch.manual_seed(0)
    plain = InterflowHead([c for c, _, _ in case.maps], case.classes, case.attention, norm="batch")
    fused, exact = FusedInterflowHead.from_eager(copy.deepcopy(plain)).to(device), copy.deepcopy(plain).double()
    maps, dy = head_inputs(case), torch.randn(case.batch, case.classes)
    outputs, found = gradients(fused, [in_layout(x.to(device), case.layout) for x in maps], dy.to(device), None)
    wanted, wanted_gradients = gradients(exact, [x.double() for x in maps], dy.double(), None)
    for name, expected in {**wanted, **{key: t for key, t in wanted_gradients.items() if t is not None}}.items():
        actual = outputs[name] if name in outputs else found[name]
        assert actual is not None, f"{name}: no gradient"
        assert_close(name, actual.cpu(), expected, 1e-4)
    assert fused.norm is not None and exact.norm is not None
    assert_close("running_mean", fused.norm.running_mean.cpu(), exact.norm.running_mean, 1e-5)


def short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.float16: "fp16"}[dtype]


def check(case: HeadCase, device: torch.device) -> None:
    plain = case.head()
    fused = FusedInterflowHead.from_eager(copy.deepcopy(plain)).to(device)  # it shares its parameters, and the plain head stays on the CPU
    maps = head_inputs(case)
    g = torch.Generator().manual_seed(2)
    n, k = len(case.maps), case.classes
    dy, dz = (torch.randn(s, generator=g, dtype=torch.float64).to(case.dtype) for s in ((case.batch, k), (case.batch, n, k)))
    outputs, found = gradients(fused, [in_layout(x.to(device), case.layout) for x in maps], dy.to(device), dz.to(device))
    exact = copy.deepcopy(plain).double()  # the plain head: PyTorch's operators, on the CPU
    wanted, wanted_gradients = gradients(exact, [x.double() for x in maps], dy, dz)
    magnitude = magnitudes(plain, maps, dy, dz)
    for name, expected in {**wanted, **{key: t for key, t in wanted_gradients.items() if t is not None}}.items():
        actual = outputs[name] if name in outputs else found[name]
        assert actual is not None, f"{name}: no gradient"
        assert_close(name, actual.cpu(), expected, magnitude=magnitude[name])
