"""MeanReLU: the ReLU at the end of a stage, which hands the mean of its map to the network around the backbone."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from interflow_kernels import _fx, stage_end

from .exchange import Exchange


@dataclass
class Offer:
    """A map with its mean [B, C], and the map's version when the mean was taken; None where versions are not counted."""

    map: Tensor
    mean: Tensor
    version: int | None

    def untouched(self) -> bool:
        """Whether nobody has written over the map since."""
        return self.version is None or self.map._version == self.version


class MeanReLU(nn.ReLU):
    """v = relu(u + residual), as an nn.ReLU in its place gives it; the mean of v over H, W comes with it in the same pass.

    The mean goes into the exchange, for a network whose forward runs; nothing is kept. It has no parameters, so the
    backbone's state_dict is what it was.

    added_in_place: whether the residual was added into u, which keeps u's dtype, where it has another one.

    Shapes: u and residual [B, C, H, W] -> v [B, C, H, W].
    """

    def __init__(self, exchange: Exchange, stage: int, inplace: bool = False, added_in_place: bool = False) -> None:
        super().__init__(inplace)  # only said: a new map is written, as autograd needs it anyway
        self.exchange, self.stage, self.added_in_place = exchange, stage, added_in_place

    def forward(self, u: Tensor, residual: Tensor | None = None) -> Tensor:
        """u, and what is added to it or None -> v."""
        if isinstance(u, fx.Proxy):
            return _traced(self, u, residual)
        if residual is not None and (residual.shape != u.shape or residual.dtype != u.dtype):
            total = u + residual
            u, residual = total.to(u.dtype) if self.added_in_place else total, None
        if u.dim() != 4:
            return F.relu(u if residual is None else u + residual)
        v, mean = stage_end(u, None, residual)
        self.exchange.put("mean", self.stage, Offer(v, mean, _version(v)))
        return v

    def extra_repr(self) -> str:
        return f"stage={self.stage}"


def _version(v: Tensor) -> int | None:
    if torch.compiler.is_compiling() or v.is_inference():
        return None
    return v._version


def _traced(module: MeanReLU, u: Any, residual: Any) -> Any:
    """One node of a graph."""
    try:
        raise TypeError(f"{type(module).__name__} is one operator")
    except TypeError:
        return _fx.leaf(module, u, residual)
