"""How cost grows with B, H*W, C, K and n: one sweep each from a middle point, for the fitted exponents of the report."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness.case import Case, Plan, Provider
from harness.inputs import cold_sets, feature_maps
from harness.roofline import HeadShape, TapShape
from harness.run import Session
from torch import Tensor

from interflow_kernels import FusedInterflowHead, stage_tap

HEAD = {"B": 8, "H*W": 28 * 28, "C": 128, "K": 100, "n": 4}
HEAD_SWEEPS = {"B": (1, 4, 16, 64), "H*W": (14**2, 28**2, 56**2, 112**2), "C": (32, 128, 512), "K": (10, 100, 1000, 4000), "n": (1, 2, 4, 8, 16)}
TAP = {"B": 8, "H*W": 56 * 56, "C": 128}
TAP_SWEEPS = {"B": (1, 4, 16, 64), "H*W": (14**2, 28**2, 56**2, 112**2), "C": (32, 128, 512)}


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    seconds = 2.0 if full else 0.3
    for operator, middle, sweeps in (("head", HEAD, HEAD_SWEEPS), ("tap", TAP, TAP_SWEEPS)):
        for letter, values in sweeps.items():
            for value in values:
                name = f"complexity, {operator} forward, {letter}={value}"
                build = partial({"head": head, "tap": tap}[operator], name, letter, {**middle, letter: value}, device)
                yield Plan(name, ("ours", "eager"), build, seconds)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


def head(name: str, letter: str, at: dict[str, int], device: torch.device) -> Case:
    side = round(at["H*W"] ** 0.5)
    maps = ((at["C"], side, side),) * at["n"]
    shape = HeadShape(maps, at["K"], at["B"], 4)
    sets = feature_maps(maps, at["B"], "fp32", "nchw", cold_sets(shape.map_bytes(), device), device)
    ours = FusedInterflowHead([at["C"]] * at["n"], at["K"]).to(device)
    return swept("head", name, letter, at, {"ours": ours, "eager": ours.to_eager()}, sets, shape.forward_bytes())


def tap(name: str, letter: str, at: dict[str, int], device: torch.device) -> Case:
    side = round(at["H*W"] ** 0.5)
    shape = TapShape(((at["C"], side, side),), (True,), at["B"], 4)
    sets = feature_maps(shape.maps, at["B"], "fp32", "nchw", cold_sets(shape.map_bytes(), device), device)

    def eager(maps: Sequence[Tensor]) -> list[Tensor]:
        v = F.relu(maps[0])
        return [F.max_pool2d(v, 2, 2), v.mean((2, 3))]

    return swept("tap", name, letter, at, {"ours": lambda maps: stage_tap(maps[0]), "eager": eager}, sets, shape.forward_bytes(training=False))


def swept(operator: str, name: str, letter: str, at: dict[str, int], ways: dict[str, Any], sets: list[list[Tensor]], moved: int) -> Case:
    def call(way: Any, i: int) -> Any:
        with torch.inference_mode():
            return way(sets[i])

    providers = {key: Provider(partial(call, way), "ours" if key == "ours" else "peer") for key, way in ways.items()}
    about = {"pass": "forward", "dtype": "fp32", "layout": "nchw", "batch": at["B"], "inputs": "cold", "sweep": letter, "x": at[letter]}
    return Case(f"complexity {operator}", name, "device", providers, about, len(sets), moved, at["B"], expected=lambda: call(ways["eager"], 0))
