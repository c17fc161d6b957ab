"""The ends of blocks and stages: in PyTorch's own operators, or the fused tap; which of them a place takes; how each is run."""

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from interflow_kernels import StageTap, conv_tap
from interflow_kernels.modules.plain import is_plain

STAGES = ("fused", "eager")
"""fused: StageTap where it serves, see conv_tap; eager: EagerStageEnd everywhere."""

_said_eager = False


class EagerStageEnd(nn.Module):
    """StageTap's place in plain PyTorch: ReLU, and the max-pool where there is one; the whole map is the feature.

        feature = relu(u);  next = max_pool2d(feature, 2, 2), or the feature itself

    Shapes: u [B, C, H, W] -> next [B, C, H // 2, W // 2] or [B, C, H, W], feature [B, C, H, W].
    """

    def __init__(self, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool

    def forward(self, u: Tensor, inplace: bool = False) -> tuple[Tensor, Tensor]:
        """The last convolution's (or norm's) output -> the next layer's input, the stage's feature. inplace: u may be written over."""
        feature = F.relu(u, inplace=inplace)
        return (F.max_pool2d(feature, 2, 2) if self.max_pool else feature), feature

    def extra_repr(self) -> str:
        return f"max_pool={self.max_pool}"


def make_stage_end(stage: str, max_pool: bool, tapped: bool, last: bool, pool_size: tuple[int, int]) -> EagerStageEnd | StageTap:
    """The module at the end of a block or stage.

    A tap gives the mean of a map that is not written, so `stage="fused"` takes one at every max-pool and at the end of the
    network, but not where the map itself is wanted: by the next convolution, or by a head with a pool_size other than 1
    (said once).
    """
    global _said_eager
    if stage == "eager" or not (max_pool or last):
        return EagerStageEnd(max_pool)
    if tapped and pool_size != (1, 1):
        if not _said_eager:
            _said_eager = True
            warnings.warn(f"pool_size={pool_size} needs whole maps: stages with a branch end in PyTorch's operators, not in the fused tap", stacklevel=5)
        return EagerStageEnd(max_pool)
    return StageTap(max_pool)


def run_relu(layer: nn.Module | None, relu: nn.Module, x: Tensor) -> Tensor:
    """relu(layer(x)), in place where nobody else has seen what `layer` gives."""
    y = x if layer is None else layer(x)
    return F.relu(y, inplace=True) if is_plain(relu, nn.ReLU) and _output_is_ours(layer) else relu(y)


def run_end(layer: nn.Module | None, end: nn.Module, x: Tensor) -> Any:
    """end(layer(x)): the next layer's input and the stage's feature; a StageTap as conv_tap runs it, an EagerStageEnd in place where run_relu would."""
    if layer is None:
        return end(x)
    return end(layer(x), inplace=_output_is_ours(layer)) if is_plain(end, EagerStageEnd) else conv_tap(layer, end, x)


def run_end_for_map(layer: nn.Module | None, max_pool: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """What an EagerStageEnd gives behind `layer`."""
    feature = F.relu(x if layer is None else layer(x), inplace=_output_is_ours(layer))
    return (F.max_pool2d(feature, 2, 2) if max_pool else feature), feature


def _output_is_ours(layer: nn.Module | None) -> bool:
    """Whether the output is a new tensor that no hook, wrapper or caller holds and that backward does not need: only then may it be written over."""
    return layer is not None and (is_plain(layer, nn.Conv2d) or is_plain(layer, nn.BatchNorm2d))
