"""Whole networks: VGG-16 with Interflow, fused and in plain PyTorch, against the plain VGG-16; inference and a training step."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from harness import goals
from harness.case import Case, Plan, Provider, distinct
from harness.inputs import FORMATS
from harness.run import Session
from networks import DIRECTIONS, NETWORKS, NO_BRANCHES, Cell, build

TOLERANCE = {"fp32": 5e-3, "bf16": 0.1, "autocast": 0.1}
"""Of the norm of logits and gradients of 13 convolutions, which sum and round in another order behind the tap's bias. Seen on a CPU in bf16: 0.022."""

MODELS = ("vgg16", "vgg16_bn")
GPU_SHAPES = [(224, 1000, b) for b in (1, 8, 32, 128, 256)] + [(32, 10, b) for b in (128, 512, 2048)]  # pixels, K, B


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    if device.type != "cuda":
        yield from cpu_plans(full, device)
    else:
        yield from distinct([*gpu_plans(device), *(gpu_grid(device) if full else [])])


def gpu_plans(device: torch.device) -> Iterator[Plan]:
    """The most telling cell of each dimension, in that order, for a run of minutes: the last ones go where its time ends. goals.gpu_network has the goals.

    224 pixels are bound by memory and arithmetic, 32 pixels at B=128 by launches. Compiled, the two networks that decide: compiling takes the time.
    """

    def at(direction: str, pixels: int, batch: int, model: str = "vgg16", dtype: str = "bf16", layout: str = "channels_last", **how: Any) -> Plan:
        cell = Cell(model, direction, pixels, batch, dtype=dtype, layout=layout, classes=1000 if pixels == 224 else 10, **how)
        return plan(cell, device, 1.5 if cell.training else 1.0, ("Interflow fused", "plain") if cell.compiled else tuple(NETWORKS))

    yield from (at(direction, 224, 32) for direction in DIRECTIONS)
    yield at("training step", 32, 128)
    yield at("inference", 32, 128, graph=True)
    yield from (at(direction, 224, batch) for batch in (1, 128) for direction in DIRECTIONS)
    yield at("training step", 224, 32, layout="nchw")
    yield at("training step", 224, 32, dtype="autocast")
    yield at("training step", 32, 2048)
    yield from (at(direction, 224, 32, compiled=True) for direction in reversed(DIRECTIONS))
    yield from (at(direction, 224, 32, model="vgg16_bn") for direction in DIRECTIONS)


def gpu_grid(device: torch.device) -> Iterator[Plan]:
    """Every combination; those that wait for no compiler first."""
    for compiled, (pixels, classes, batch), dtype, layout, model, direction in product(
        (False, True), GPU_SHAPES, ("bf16", "autocast"), reversed(FORMATS), MODELS, DIRECTIONS
    ):
        yield plan(Cell(model, direction, pixels, batch, dtype=dtype, layout=layout, compiled=compiled, classes=classes), device, 3, tuple(NETWORKS))


def cpu_plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """What a CPU's targets are set on; with `full` everything."""
    yield plan(Cell("vgg16", "training step", 32, 64), device, 32)
    yield plan(Cell("vgg16", "inference", 32, 64), device, 8)
    yield plan(Cell("vgg16_bn", "training step", 32, 64, width=0.25), device, 6)
    if not full:
        return
    for model, direction, layout, compiled in product(MODELS, DIRECTIONS, FORMATS, (False, True)):
        if (model, layout, compiled) != ("vgg16", "nchw", False):  # those of the quick set
            yield plan(Cell(model, direction, 32, 64, layout=layout, compiled=compiled), device, 60)
        for batch in (1, 4):
            yield plan(Cell(model, direction, 224, batch, layout=layout, compiled=compiled), device, 60)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


def plan(cell: Cell, device: torch.device, seconds: float, names: tuple[str, ...] = tuple(name for name in NETWORKS if name != NO_BRANCHES)) -> Plan:
    setup = len(names) * (15.0 if cell.training else 8.0) if cell.compiled else 2.0  # a guess; only a run with a budget looks at it
    return Plan(cell.name, names, partial(case_of, cell, names, device), seconds, setup)


def case_of(cell: Cell, names: tuple[str, ...], device: torch.device) -> Case:
    """Beside its providers the case holds the naive network, which every result is compared with."""
    made = build(cell, dict.fromkeys([*names, "Interflow naive"]), device)
    providers = {}
    for name in names:
        network = made[name]
        extra = {"result": network.results, "saved": network.saved} if cell.training else {}
        providers[name] = Provider(network.call, NETWORKS[name][0], **extra)
    chosen = []
    if device.type == "cuda" and (cell.dtype, cell.layout) == ("bf16", "channels_last"):
        chosen = goals.gpu_network(
            cell.model, cell.direction, cell.pixels, cell.batch, cell.compiled or cell.graph, NO_BRANCHES if NO_BRANCHES in names else None
        )
    elif device.type == "cpu" and (cell.pixels, cell.batch, cell.width, cell.compiled) == (32, 64, 1, False):
        chosen = [goals.faster_than("plain", 1.0, low=0.98)]
    about = {key: getattr(cell, key) for key in ("dtype", "layout", "batch", "pixels", "classes", "model", "compiled")}
    return Case(
        "network",
        cell.name,
        "device" if cell.graph else "wall",
        providers,
        {"pass": cell.direction, **about},
        images=cell.batch,
        expected=partial(made["Interflow naive"].results, eager=True),
        tolerance=TOLERANCE[cell.dtype],
        by_norm=True,
        goals={"Interflow fused": chosen},
        memory=True,
    )
