"""A data set cut into parts: disjoint, complete, every class in proportion, the same for the same seed."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError


def stratified(target: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Indices of parts of these sizes, which add up to N; the same for the same seed, whatever else was drawn before.

    target [N] -> index tensors.
    """
    generator = torch.Generator().manual_seed(seed)
    # Each class is spread evenly over the interval [0, 1); cutting the sorted order anywhere then cuts every class in proportion.
    place = torch.empty(len(target), dtype=torch.float64)
    for label in target.unique():
        members = (target == label).nonzero().flatten()
        rank = torch.randperm(len(members), generator=generator)
        place[members] = (rank + torch.rand(len(members), generator=generator, dtype=torch.float64)) / len(members)
    return list(place.argsort(stable=True).split(list(sizes)))


def held_out(target: Tensor, images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of training and validation, each in the order of the data set; `images` of them are for validation.

    Raises UserError where nothing would be left for training.
    """
    if not 0 < images < len(target):
        raise UserError(f"validation must be at least 1 and leave some of the {len(target)} training images, got {images}: give another --data.validation")
    validation, training = stratified(target, (images, len(target) - images), seed)
    return training.sort().values, validation.sort().values
