"""A drawer of calls for interflow_pool: features as the head takes them, of any dtypes, then now and then some that do not fit."""

from typing import Any

import torch
from torch import Tensor

from interflow_kernels.reference import interflow_pool as reference_pool

from . import targets
from .oracle import Call, Expected
from .values import Random, chance, wrong_size


def _exact(features: list[Tensor], pool_size: tuple[int, int], dp: Tensor | None, sizes: bool) -> dict[str, Tensor]:
    """pooled and every gradient in fp64; sizes: of the absolute values, which errors are measured beside."""
    leaves = [(x.detach().double().abs() if sizes else x.detach().double()).requires_grad_() for x in features]
    pooled = reference_pool(leaves, pool_size)
    found = {"pooled": pooled.detach()}
    if dp is not None:
        dp = dp.double().abs() if sizes else dp.double()
        grads = torch.autograd.grad(pooled, leaves, dp, allow_unused=True)
        found |= {f"features[{i}]": torch.zeros_like(x) if g is None else g for i, (x, g) in enumerate(zip(leaves, grads, strict=True))}
    return found


def draw_raw_interflow_pool(r: Random) -> Call:
    h = targets.head_arguments(r)
    a: dict[str, Any] = {"features": h["features"], "pool_size": list(h["pool_size"])}
    if h["features"][0].dtype != torch.float64 and chance(r, 0.3):
        a["features"] = [x.to(r.choice((torch.float32, torch.bfloat16, torch.float16))) for x in a["features"]]
    broken = targets._broken(r, a, {"features": lambda: targets.break_features(r, a["features"]), "pool_size": lambda: wrong_size(r)})
    if isinstance(a["features"], list):
        a["features"] = [targets._leaf(r, x, 0.5) for x in a["features"]]
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        results = {"pooled": targets.raw.interflow_pool(**a)}
        grads, up = targets.differentiated(r, results, {f"features[{i}]": x for i, x in enumerate(a["features"])})
        used.update(up)
        return {**results, **grads}

    def expect() -> Expected:
        features = a["features"]
        if not all(isinstance(x, Tensor) and x.dim() in (2, 4) for x in features) or len({x.shape[0] for x in features}) != 1:
            raise ValueError("the definition does not take this")
        size = a["pool_size"]
        pool = (int(size[0]), int(size[1])) if hasattr(size, "__len__") else (int(size), int(size))  # the dispatcher makes two of one number
        accumulation = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        values, sizes = (_exact(features, pool, used.get("pooled"), each) for each in (False, True))
        return Expected(values, sizes, {}, accumulation)

    return Call(a, run, expect, broken)
