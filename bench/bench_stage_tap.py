"""The end of a stage: stage_tap against PyTorch's relu, max-pool and mean, and the whole stage with Interflow against the plain one."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals, peers
from harness.case import Case, Plan, Provider, distinct
from harness.gate import TOLERANCE
from harness.inputs import DTYPES, cold_sets, feature_maps
from harness.memory import saved_bytes
from harness.roofline import BOUNDARIES, HEAD_STAGES, TapShape
from harness.run import Session, device_limits, limit_copy, limit_read
from harness.twin import triton
from torch import Tensor

from interflow_kernels import FusedInterflowHead, stage_tap

LAYOUTS = ("nchw", "channels_last")
STAGES = {"four stages": HEAD_STAGES, "five boundaries": BOUNDARIES}
PASSES = ("forward", "forward keeping masks", "forward+backward")
GOALS = {"forward": 7.0, "forward+backward": 5.0}  # fp32, B=8, the four stages, both layouts
MODES = ("ours", "eager", "compiled")


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    if device.type != "cuda":
        yield from cpu_plans(full, device)
    else:
        yield from distinct([*gpu_plans(device), *(cpu_plans(True, device) if full else [])])


def gpu_plans(device: torch.device) -> Iterator[Plan]:
    """Every boundary of VGG-16 in bf16 with the convolutions' biases, forward for training and backward, whose goals goals.GPU_TAP has."""
    for batch in (32, 128):
        for layout in ("channels_last", "nchw"):
            for direction in ("forward keeping masks", "backward"):
                yield plan("five boundaries", direction, "bf16", layout, batch, True, MODES, device, 1)
    for layout in ("channels_last", "nchw"):
        yield plan("five boundaries", "forward", "bf16", layout, 8, True, MODES, device, 0.8)


def cpu_plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """What a CPU's targets are set on; with `full` everything, on any device."""
    chosen = [("four stages", p, "fp32", layout, 8, False) for p in ("forward", "forward+backward") for layout in LAYOUTS]
    chosen += [("four stages", "forward", "fp32", layout, b, False) for layout in LAYOUTS for b in (1, 32)]
    chosen += [("four stages", "forward", "bf16", layout, 8, False) for layout in LAYOUTS]
    chosen += [("five boundaries", "forward", "fp32", "nchw", 8, False), ("four stages", "forward", "fp32", "nchw", 8, True)]
    if full:
        chosen = [(s, p, d, layout, b, False) for s in STAGES for p in PASSES for d in DTYPES for layout in LAYOUTS for b in (1, 8, 32)]
        chosen += [("four stages", p, "fp32", layout, 8, True) for p in PASSES for layout in LAYOUTS]
    for stages, direction, dtype, layout, batch, shift in chosen:
        heavy = direction == "forward+backward"
        yield plan(stages, direction, dtype, layout, batch, shift, MODES, device, 4 if heavy else 2)
    for layout in LAYOUTS:
        yield Plan(f"stages with Interflow, forward+backward fp32 {layout} B=8", ("ours", "eager", "plain"), partial(with_head, layout, device), 4)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


def plan(stages: str, direction: str, dtype: str, layout: str, batch: int, shift: bool, modes: tuple[str, ...], device: torch.device, seconds: float) -> Plan:
    name = f"tap, {stages}, {direction} {dtype} {layout} B={batch}" + " with shift" * shift + " beside Triton" * ("Triton" in modes)
    build = partial(alone, name, stages, direction, dtype, layout, batch, shift, modes, device)
    return Plan(name, (*modes, "read", "copy", *(["launch"] if device.type == "cuda" else [])), build, seconds)


# --- the operator alone -----------------------------------------------------------------------------------------------
def plain_tap(u: Tensor, shift: Tensor | None, max_pool: bool) -> list[Tensor]:
    """PyTorch's own composition -> [m, p], or [p]; the convolution has added the bias already unless there is a shift."""
    v = F.relu(u if shift is None else u + shift[:, None, None])
    return [*([F.max_pool2d(v, 2, 2)] if max_pool else []), v.mean((2, 3))]


def fused_tap(u: Tensor, shift: Tensor | None, max_pool: bool) -> list[Tensor]:
    """stage_tap -> [m, p], or [p]."""
    return [x for x in stage_tap(u, shift, max_pool=max_pool) if x is not None]


def alone(name: str, stages: str, direction: str, dtype: str, layout: str, batch: int, shift: bool, modes: tuple[str, ...], device: torch.device) -> Case:
    maps = STAGES[stages]
    differentiates = direction in ("forward+backward", "backward")
    max_pool = tuple(stages == "four stages" or i < len(maps) - 1 for i in range(len(maps)))
    shape = TapShape(maps, max_pool, batch, DTYPES[dtype].itemsize)
    sets = feature_maps(maps, batch, dtype, layout, cold_sets(shape.map_bytes(), device), device)
    generator = torch.Generator(device).manual_seed(1)
    shifts = [torch.randn(c, generator=generator, device=device).to(DTYPES[dtype]) if shift else None for c, _, _ in maps]

    def run(tap: Callable[..., list[Tensor]], us: list[Tensor], bs: list[Tensor | None]) -> list[Tensor]:
        return [y for u, b, m in zip(us, bs, max_pool, strict=True) for y in tap(u, b, m)]

    torch.compiler.reset()
    if direction == "backward":  # one forward pass is differentiated again and again: a compiled one must not give its memory away
        torch._functorch.config.donated_buffer = False
    kept: dict[Any, Any] = {}  # for "backward": outputs and leaves of the forward pass, by way, input set and stream
    ways: dict[str, Callable[..., list[Tensor]]] = {
        "ours": partial(run, fused_tap),
        "Triton": partial(run, fused_tap),
        "eager": partial(run, plain_tap),
        "compiled": peers.compiled(partial(run, plain_tap)),
    }
    up = [torch.randn(y.shape, generator=generator, device=device).to(y) for y in run(plain_tap, sets[0], shifts)]
    up = [g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 and layout == "channels_last" else g for g in up]

    def step(way: Callable[..., list[Tensor]], given: list[Tensor], bs: list[Tensor | None], downs: list[Tensor]) -> list[Tensor]:
        if direction == "forward":
            with torch.inference_mode():
                return way(given, bs)
        leaves = [u.detach().requires_grad_() for u in given]
        biases = [None if b is None else b.detach().requires_grad_() for b in bs]
        ys = way(leaves, biases)
        if direction != "forward+backward":
            return ys
        return [*ys, *torch.autograd.grad(ys, [*leaves, *(b for b in biases if b is not None)], [g.to(y.dtype) for g, y in zip(downs, ys, strict=True)])]

    def backward(mode: str, i: int) -> list[Tensor]:
        """The backward pass alone, of a forward pass on the same stream: autograd runs it there."""
        key = mode, i, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if key not in kept:
            leaves = [t.detach().requires_grad_() for t in (*sets[i], *(b for b in shifts if b is not None))]
            kept[key] = ways[mode](leaves[: len(maps)], leaves[len(maps) :] if shift else shifts), leaves
        ys, leaves = kept[key]
        return list(torch.autograd.grad(ys, leaves, [g.to(y.dtype) for g, y in zip(up, ys, strict=True)], retain_graph=True))

    def expected() -> list[Tensor]:
        if direction == "backward":
            return backward("eager", 0)
        if dtype == "fp32":
            return step(ways["eager"], [u.double() for u in sets[0]], [b if b is None else b.double() for b in shifts], up)
        return step(ways["eager"], sets[0], shifts, up)  # which element of a window is the first maximum depends on the rounding

    providers = {}
    for mode in modes:
        forward = partial(lambda way: way([u.detach().requires_grad_() for u in sets[0]], shifts), ways[mode])
        saved = partial(saved_bytes, forward, sets[0]) if differentiates else None
        call = partial(backward, mode) if direction == "backward" else lambda i, way=ways[mode]: step(way, sets[i], shifts, up)
        provider = Provider(call, "ours" if mode == "ours" else "peer", saved=saved)
        providers[mode] = triton(provider) if mode == "Triton" else provider
    providers["read"] = limit_read(sets)
    providers |= device_limits(device) if device.type == "cuda" else {"copy": limit_copy(sets)}
    about = {"pass": direction, "dtype": dtype, "layout": layout, "batch": batch, "pixels": 224, "inputs": "cold", "stages": stages, "shift": shift}
    moved = (shape.backward_bytes() if differentiates else 0) + (0 if direction == "backward" else shape.forward_bytes(training=direction != "forward"))
    gpu_goals = goals.GPU_TAP.get((direction, layout), []) if device.type == "cuda" and dtype == "bf16" and batch >= 32 and shift else []
    bound = GOALS.get(direction) if (stages, dtype, batch, shift) == ("four stages", "fp32", 8, False) and device.type == "cpu" else None
    return Case(
        "stage_tap",
        name,
        "device",
        providers,
        about,
        len(sets),
        moved,
        batch,
        expected=expected,
        tolerance=TOLERANCE[DTYPES[dtype]],
        goals={"ours": [goals.faster_than_peers(bound)] if bound else gpu_goals, "Triton": goals.GPU_TWIN.get(direction, [])},
        memory=differentiates,
    )


# --- the whole stage: with Interflow in one pass, with it in plain PyTorch, and without it ------------------------------------
def with_head(layout: str, device: torch.device) -> Case:
    us = [u.requires_grad_() for u in feature_maps(HEAD_STAGES, 8, "fp32", layout, 1, device)[0]]
    torch.manual_seed(0)
    fused = FusedInterflowHead([c for c, _, _ in HEAD_STAGES], 1000, "nxn").to(device)
    eager = fused.to_eager()
    parameters = list(fused.parameters())
    dm = [torch.randn_like(F.max_pool2d(u.detach(), 2, 2)) for u in us]
    dy = torch.randn(8, 1000, device=device)

    def forward(kind: str) -> list[Tensor]:
        if kind == "ours":
            pairs = [stage_tap(u) for u in us]
            return [*(m for m, _ in pairs if m is not None), fused([p for _, p in pairs])]
        vs = [F.relu(u) for u in us]
        ms = [F.max_pool2d(v, 2, 2) for v in vs]
        return [*ms, eager(vs)] if kind == "eager" else ms

    def step(kind: str, _: int) -> list[Tensor]:
        ys = forward(kind)
        leaves = us if kind == "plain" else [*us, *parameters]
        return [*ys, *torch.autograd.grad(ys, leaves, dm if kind == "plain" else [*dm, dy])]

    def provider(kind: str, role: Any) -> Provider:
        return Provider(partial(step, kind), role, saved=partial(saved_bytes, partial(forward, kind), [*us, *parameters]))

    return Case(
        "stages with Interflow",
        f"stages with Interflow, forward+backward fp32 {layout} B=8",
        "device",
        {"ours": provider("ours", "ours"), "eager": provider("eager", "peer"), "plain": provider("plain", "base")},
        {"pass": "forward+backward", "dtype": "fp32", "layout": layout, "batch": 8, "pixels": 224, "classes": 1000, "inputs": "warm"},
        images=8,
        expected=lambda: step("eager", 0),
        tolerance=1e-4,
        goals={"ours": [goals.faster_than("plain", 1.0)]},
        memory=True,
    )
