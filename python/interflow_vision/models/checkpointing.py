"""Activation checkpointing of a trunk: backward runs each block again in place of keeping its maps."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recomputed(run: Callable[..., Any], x: Tensor, layers: Sequence[nn.Module]) -> Any:
    """run(x) without keeping what is between; `layers` are those that it runs.

    The numbers are those without checkpointing: the second run of a batch norm leaves its running statistics alone.
    """
    norms = [module for layer in layers for module in layer.modules() if isinstance(module, _BatchNorm)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _without_statistics(norms)

    return checkpoint(run, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def _without_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Norms whose statistics are copies, so that what is tracked meanwhile is forgotten."""
    kept = [dict(norm._buffers) for norm in norms]
    for norm in norms:
        norm._buffers.update({name: None if buffer is None else buffer.clone() for name, buffer in norm._buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
