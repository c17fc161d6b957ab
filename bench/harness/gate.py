"""The gate: no provider is timed before its results are right."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error beside the largest expected value, for one operator. Networks give their own."""


def refuse_wrong(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, by_norm: bool = False) -> None:
    """Raises AssertionError unless each result has its shape and an error of at most `tolerance`, beside the largest expected value.

    by_norm: the norm of the error beside the norm of what is expected. For results of many rounded steps, a network's gradients, where the
    largest of millions of errors says how many there are, not how large they are.
    """
    assert len(actual) == len(expected), f"{name} gives {len(actual)} results, {len(expected)} expected: not timed"
    of = "norm" if by_norm else "largest value"
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, f"{name}, result {i} is {tuple(a.shape)}, expected {tuple(e.shape)}: not timed"
        error = float(size(a.double() - e.double(), by_norm) / size(e.double(), by_norm).clamp_min(1e-300))
        assert error <= tolerance, f"{name}, result {i} is wrong by {error:.1e} of the {of}, allowed {tolerance:.1e}: not timed"


def size(x: Tensor, by_norm: bool) -> Tensor:
    """The norm of x, or its largest absolute value."""
    return torch.linalg.vector_norm(x) if by_norm else x.abs().max()


def tensors(results: object) -> list[Tensor]:
    """A provider's results as a flat list, without the None of optional ones."""
    if isinstance(results, Tensor):
        return [results.detach()]
    if isinstance(results, Iterable) and not isinstance(results, (str, bytes, dict)):
        return [tensor for result in results for tensor in tensors(result)]
    return []
