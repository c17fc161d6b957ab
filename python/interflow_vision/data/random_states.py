"""The states of all random number generators of a process: taken, and set again."""

import random
from typing import Any

import numpy as np
import torch


def states(device: torch.device | None = None) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, and of the one of `device`; tensors and numbers only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    kept = {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device is not None and device.type in ("cuda", "xpu"):
        kept[device.type] = getattr(torch, device.type).get_rng_state(device)
    elif device is not None and device.type == "mps":
        kept["mps"] = torch.mps.get_rng_state()
    return kept


def restore(kept: dict[str, Any], device: torch.device | None = None) -> None:
    """Sets the generators to what `states` gave."""
    version, numbers, gauss = kept["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, normal = kept["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, normal))
    torch.set_rng_state(kept["torch"].cpu())
    if device is not None and device.type in kept:
        if device.type == "mps":
            torch.mps.set_rng_state(kept["mps"].cpu())
        else:
            getattr(torch, device.type).set_rng_state(kept[device.type].cpu(), device)
