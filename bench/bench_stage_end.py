"""The end of a stage that passes its map on: stage_end against PyTorch's add, relu and mean, and against the stage's end without Interflow."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals, peers
from harness.case import Case, Plan, Provider
from harness.gate import TOLERANCE
from harness.inputs import DTYPES, cold_sets, feature_maps
from harness.memory import saved_bytes
from harness.roofline import RESNET_STAGES, EndShape
from harness.run import Session, device_limits, limit_copy, limit_read
from torch import Tensor

from interflow_kernels import stage_end

LAYOUTS = ("nchw", "channels_last")
PASSES = ("forward", "forward+backward")
MODES = ("ours", "eager", "compiled", "plain")
Ends = list[tuple[Tensor, Tensor | None]]


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """The four stage ends of ResNet-50 at 224 pixels: a shortcut added, then relu. Without a shortcut and without relu: with `full`."""
    gpu = device.type == "cuda"
    chosen = [("residual", "relu", p, "bf16" if gpu else "fp32", layout, 32 if gpu else 8) for p in PASSES for layout in LAYOUTS]
    if full:
        forms = (("residual", "relu"), ("alone", "relu"), ("alone", "none"))
        chosen = [(*form, p, d, layout, b) for form in forms for p in PASSES for d in DTYPES for layout in LAYOUTS for b in (1, 8, 32)]
    for shortcut, activation, direction, dtype, layout, batch in chosen:
        name = f"stage end, {shortcut}, {activation}, {direction} {dtype} {layout} B={batch}"
        build = partial(alone, name, shortcut, activation, direction, dtype, layout, batch, device)
        yield Plan(name, (*MODES, "read", "copy", *(["launch"] if gpu else [])), build, 1 if gpu else 3)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


# --- the ways ---------------------------------------------------------------------------------------------------------
def plain_end(u: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """What a network without Interflow does there."""
    v = u if residual is None else u + residual
    return F.relu(v) if activation == "relu" else v.clone() if v is u else v


def eager_end(u: Tensor, residual: Tensor | None, activation: str) -> list[Tensor]:
    """PyTorch's own composition -> [v, p]."""
    v = plain_end(u, residual, activation)
    return [v, v.mean((2, 3))]


def alone(name: str, shortcut: str, activation: str, direction: str, dtype: str, layout: str, batch: int, device: torch.device) -> Case:
    has_residual, differentiates = shortcut == "residual", direction == "forward+backward"
    shape = EndShape(RESNET_STAGES, batch, DTYPES[dtype].itemsize, has_residual, activation == "relu")
    count = cold_sets(shape.map_bytes() * (2 if has_residual else 1), device)
    us = feature_maps(RESNET_STAGES, batch, dtype, layout, count, device)
    residuals: list[list[Tensor] | list[None]] = [[None] * len(RESNET_STAGES)] * count
    if has_residual:
        residuals = [[x.flip(0).clone(memory_format=torch.preserve_format) for x in each] for each in us]

    ends: dict[str, Callable[..., list[Tensor]]] = {
        "ours": lambda u, r: [*stage_end(u, None, r, activation=activation)],
        "eager": lambda u, r: eager_end(u, r, activation),
        "plain": lambda u, r: [plain_end(u, r, activation)],
    }

    def run(end: Callable[..., list[Tensor]], pairs: Ends) -> list[Tensor]:
        return [y for u, r in pairs for y in end(u, r)]

    torch.compiler.reset()
    ways: dict[str, Callable[[Ends], list[Tensor]]] = {mode: partial(run, end) for mode, end in ends.items()}
    ways["compiled"] = peers.compiled(partial(run, ends["eager"]))
    generator = torch.Generator(device).manual_seed(1)
    pairs_of = lambda i: list(zip(us[i], residuals[i], strict=True))  # noqa: E731
    up = [torch.randn(y.shape, generator=generator, device=device).to(y) for y in ways["eager"](pairs_of(0))]
    up = [g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 and layout == "channels_last" else g for g in up]

    def leaves(pairs: Ends) -> Ends:
        return [(u.detach().requires_grad_(), None if r is None else r.detach().requires_grad_()) for u, r in pairs]

    def step(mode: str, pairs: Ends, downs: list[Tensor]) -> list[Tensor]:
        if not differentiates:
            with torch.inference_mode():
                return ways[mode](pairs)
        given = leaves(pairs)
        ys = ways[mode](given)
        chosen = [g for g in downs if mode != "plain" or g.dim() == 4]
        wanted = [t for pair in given for t in pair if t is not None]
        return [*ys, *torch.autograd.grad(ys, wanted, [g.to(y.dtype) for g, y in zip(chosen, ys, strict=True)])]

    def expected() -> list[Tensor]:
        if dtype != "fp32":
            return step("eager", pairs_of(0), up)
        return step("eager", [(u.double(), None if r is None else r.double()) for u, r in pairs_of(0)], up)

    providers = {}
    for mode in MODES:
        saved = partial(saved_bytes, lambda way=ways[mode]: way(leaves(pairs_of(0))), us[0]) if differentiates else None
        role = "ours" if mode == "ours" else "base" if mode == "plain" else "peer"
        providers[mode] = Provider(lambda i, mode=mode: step(mode, pairs_of(i), up), role, saved=saved)
    providers["read"] = limit_read(us)
    providers |= device_limits(device) if device.type == "cuda" else {"copy": limit_copy(us)}
    about = {
        "pass": direction,
        "dtype": dtype,
        "layout": layout,
        "batch": batch,
        "pixels": 224,
        "inputs": "cold",
        "shortcut": shortcut,
        "activation": activation,
    }
    return Case(
        "stage_end",
        name,
        "device",
        providers,
        about,
        count,
        shape.forward_bytes() + (shape.backward_bytes() if differentiates else 0),
        batch,
        expected=expected,
        tolerance=TOLERANCE[DTYPES[dtype]],
        goals={"ours": [goals.faster_than("plain", 1.0)]} if shortcut == "residual" else {},
        memory=differentiates,
    )
