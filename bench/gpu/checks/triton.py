"""The operators in Triton, a dozen calls that differ in what is absent: each is a few compilations. On a CPU by Triton's interpreter."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from functools import partial

import torch

from interflow_kernels import FusedInterflowHead
from interflow_kernels.testing import EndCase, HeadCase, TapCase, assert_close, head_inputs

from . import Check, Skipped, end, head, tap

MAPS = ((40, 7, 5), (17, 3, 3))
BF16, FP32 = torch.bfloat16, torch.float32


def checks(device: torch.device) -> Iterator[Check]:
    def made(name: str, check: Callable[..., None], *arguments: object) -> Check:
        return Check(f"triton {name}", partial(where_it_runs, device, partial(check, *arguments, device)))

    yield made("tap dm channels_last", tap.check, TapCase(dtype=BF16, layout="channels_last"), ("dm",))
    yield made("tap dm+dp contiguous", tap.check, TapCase(dtype=FP32, layout="contiguous"), ("dm", "dp"))
    yield made("tap mean dp", tap.check, TapCase(dtype=BF16, layout="channels_last", max_pool=False), ("dp",))
    yield made("end dv+dp residual", end.check, EndCase(dtype=BF16, layout="channels_last", residual="channels_last"), ("dv", "dp"))
    yield made("end dp, no activation", end.check, EndCase(dtype=FP32, layout="contiguous", activation="none", shift="none", residual="none"), ("dp",))
    for attention, bias, dtype in (("nxn", True, BF16), ("classwise", False, FP32), ("gated", True, BF16)):
        case = HeadCase(2, MAPS, 10, attention, layout="channels_last", dtype=dtype, bias=bias)
        yield made(f"head {attention}", head.check, case)
    yield made("head folded", check_folded)
    yield made("head of frozen maps", check_frozen, True)
    yield made("head of frozen parameters", check_frozen, False)


def check_folded(device: torch.device) -> None:
    case = HeadCase(2, MAPS, 10)
    plain, maps = case.head(), head_inputs(case)
    folded = FusedInterflowHead.from_eager(case.head()).to(device).fold()
    assert_close("y", folded([x.to(device) for x in maps]).cpu(), plain.double()([x.double() for x in maps]), 1e-5)


def check_frozen(maps_are: bool, device: torch.device) -> None:
    """The gradients that are wanted, with dy alone, beside those of PyTorch in fp64."""
    case = HeadCase(2, MAPS, 10, "nxn")
    found = []
    for module, place, dtype in ((FusedInterflowHead.from_eager(case.head()), device, FP32), (case.head(), torch.device("cpu"), torch.float64)):
        there = module.to(place, dtype).requires_grad_(maps_are)
        maps = [x.to(place, dtype).requires_grad_(not maps_are) for x in head_inputs(case)]
        leaves = dict(there.named_parameters()) if maps_are else {f"features[{i}]": x for i, x in enumerate(maps)}
        y = there(maps)
        found.append(dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True)))
    for name, expected in found[1].items():
        assert_close(name, found[0][name].cpu(), expected, 1e-4)


def where_it_runs(device: torch.device, check: Callable[[], None]) -> None:
    if importlib.util.find_spec("triton") is None:
        raise Skipped("Triton is not installed")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("on a CPU Triton's kernels run with TRITON_INTERPRET=1")
    check()
