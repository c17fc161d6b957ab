"""The order in which training images are read: one shuffle for all processes, which does not depend on how many there are."""

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data.distributed import DistributedSampler

_PIECE = 1 << 14
"""Indices that are Python numbers at one time."""


class SharedShuffle(DistributedSampler[Any]):
    """DistributedSampler whose processes together read, in each step, the images that one process reads with the same global batch.

    Image p of the epoch's order goes to process p mod `num_replicas`; where the processes cannot have the same number, the first images of
    the order come twice. It serves a single process too. Seed: that of seed_everything, which all processes have.

    Memory: 8 bytes for each image of the data set; torch's own makes a list of Python numbers, 40 bytes for each.
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=True, seed=int(os.environ.get("PL_GLOBAL_SEED", 0)))

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator)  # type: ignore[arg-type]
        places = torch.arange(self.rank, self.total_size, self.num_replicas) if self.total_size > len(order) else None
        own = order[self.rank :: self.num_replicas] if places is None else order[places % len(order)]
        for piece in own.split(_PIECE):
            yield from piece.tolist()
