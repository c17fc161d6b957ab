"""The end of a block or stage: in PyTorch's own operators, or the fused tap; and which of them a position in a network takes."""

import warnings

import torch.nn.functional as F
from torch import Tensor, nn

from interflow_kernels import StageTap, TapConv2d

STAGES = ("fused", "eager")
"""fused: StageTap where it serves, its convolution a TapConv2d; eager: StageEnd everywhere."""

_said_eager = False


class StageEnd(nn.Module):
    """StageTap's place in plain PyTorch: ReLU, and the max-pool where there is one; the whole map is the feature.

        feature = relu(u + shift);  next = max_pool2d(feature, 2, 2), or the feature itself

    Shapes: u [B, C, H, W], shift [C] or None -> next [B, C, H // 2, W // 2] or [B, C, H, W], feature [B, C, H, W].
    """

    def __init__(self, max_pool: bool) -> None:
        super().__init__()
        self.max_pool = max_pool

    def forward(self, u: Tensor, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The last convolution's (or norm's) output, its bias -> the next layer's input, the stage's feature."""
        feature = F.relu(u, inplace=True) if shift is None else F.relu(u + shift.to(u.dtype)[:, None, None])
        return (F.max_pool2d(feature, 2, 2) if self.max_pool else feature), feature

    def extra_repr(self) -> str:
        return f"max_pool={self.max_pool}"


def stage_end(stage: str, max_pool: bool, tapped: bool, last: bool, pool_size: tuple[int, int]) -> StageEnd | StageTap:
    """The module at the end of a block or stage.

    A tap gives the mean of a map that is not written, so `stage="fused"` takes one at every max-pool and at the end of the
    network, but not where the map itself is wanted: by the next convolution, or by a head with a pool_size other than 1
    (said once).
    """
    global _said_eager
    if stage == "eager" or not (max_pool or last):
        return StageEnd(max_pool)
    if tapped and pool_size != (1, 1):
        if not _said_eager:
            _said_eager = True
            warnings.warn(f"pool_size={pool_size} needs whole maps: stages with a branch end in PyTorch's operators, not in the fused tap", stacklevel=5)
        return StageEnd(max_pool)
    return StageTap(max_pool)


def convolution(in_channels: int, out_channels: int, leaves_bias: bool) -> nn.Conv2d:
    """A 3x3 convolution of VGG; `leaves_bias`: a tap behind it adds the bias."""
    return (TapConv2d if leaves_bias else nn.Conv2d)(in_channels, out_channels, 3, padding=1)
