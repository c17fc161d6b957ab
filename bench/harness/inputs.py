"""Seeded feature maps in the layouts and dtypes of the cases."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .machine import cold_bytes
from .roofline import Map

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def feature_maps(maps: Sequence[Map], batch: int, dtype: str, layout: str, sets: int, device: torch.device, seed: int = 0) -> list[list[Tensor]]:
    """`sets` lists of normally distributed maps [B, C, H, W], made on the device: a CPU would take minutes for a GPU's."""
    generator = torch.Generator(device).manual_seed(seed)

    def one(m: Map) -> Tensor:
        return torch.randn(batch, *m, generator=generator, device=device).to(dtype=DTYPES[dtype], memory_format=FORMATS[layout])

    return [[one(m) for m in maps] for _ in range(sets)]


def cold_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets must take turns so that no cache holds one until it comes again; at most 512."""
    return min(512, -(-cold_bytes(device) // bytes_each) + 1)
