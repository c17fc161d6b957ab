"""The classifiers a model can carry, by name: the Interflow heads and the arms they are compared with."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interflow_kernels import AuxiliaryHeads, FusedInterflowHead, InterflowHead

HEADS = ("fused", "eager", "auxiliary", "concat", "last")
"""fused: FusedInterflowHead; eager: InterflowHead; auxiliary: AuxiliaryHeads; concat: ConcatHead; last: LastHead."""


def pooled(features: Sequence[Tensor], pool_size: int | tuple[int, int], dtype: torch.dtype) -> Tensor:
    """p = cat(flatten(adaptive_avg_pool2d(x_i, pool_size))): n of [B, C_i, H_i, W_i] or, already pooled, [B, D_i] -> [B, D] in `dtype`."""
    return torch.cat([(x if x.dim() == 2 else F.adaptive_avg_pool2d(x, pool_size).flatten(1)).to(dtype) for x in features], 1)


class ConcatHead(nn.Module):
    """The control arm: one fully connected layer on the concatenated pooled features, y = cat(p_i) W^T + b.

    It reaches the same functions as the four linear attention modes and differs from them only in how it trains. norm="batch": a BatchNorm1d
    on the concatenated p_i, as the Interflow head's norm.
    Shapes: features as InterflowHead, n of [B, C_i, H_i, W_i] or [B, D_i]; logits [B, K].
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, pool_size: int | tuple[int, int] = 1, norm: str | None = None) -> None:
        super().__init__()
        if norm not in (None, "batch"):
            raise ValueError(f"norm must be None or 'batch', got {norm!r}")
        self.pool_size = (pool_size, pool_size) if isinstance(pool_size, int) else pool_size
        width = sum(in_channels) * self.pool_size[0] * self.pool_size[1]
        self.norm = nn.BatchNorm1d(width) if norm == "batch" else None
        self.fc = nn.Linear(width, num_classes)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """n features -> logits [B, K]."""
        p = pooled(features, self.pool_size, next(self.fc.parameters()).dtype)
        return self.fc(p if self.norm is None else self.norm(p))


class LastHead(ConcatHead):
    """The plain network: the last feature only, pooled, one fully connected layer. y = p_n W^T + b."""

    def __init__(self, in_channels: Sequence[int], num_classes: int, *, pool_size: int | tuple[int, int] = 1, norm: str | None = None) -> None:
        super().__init__(in_channels[-1:], num_classes, pool_size=pool_size, norm=norm)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """n features, of which the last one counts -> logits [B, K]."""
        return super().forward(features[-1:])


def create_head(
    head: str,
    in_channels: Sequence[int],
    num_classes: int,
    *,
    attention: str = "nxn",
    pool_size: int | tuple[int, int] = 1,
    attention_bias: bool = False,
    hard_weights: Sequence[float] | None = None,
    auxiliary_weight: float = 0.3,
    norm: str | None = None,
    branch_loss: float = 0.0,
) -> nn.Module:
    """The head called `head` (one of HEADS). `attention` and what belongs to it counts for "fused" and "eager" only.

    norm: None or "batch", not for "auxiliary"; branch_loss: of "fused" and "eager", see InterflowHead.
    Raises ValueError for an unknown head, and what the head itself raises.
    """
    if head in ("fused", "eager"):
        kind: type[InterflowHead] = FusedInterflowHead if head == "fused" else InterflowHead
        options: dict[str, Any] = {"pool_size": pool_size, "attention_bias": attention_bias, "hard_weights": hard_weights}
        options |= {"norm": norm, "branch_loss": branch_loss}
        return kind(in_channels, num_classes, attention, **options)
    if branch_loss:
        raise ValueError(f"branch_loss must be 0 for head={head!r}, got {branch_loss!r}; it is for the Interflow head, 'fused' or 'eager'")
    if head == "auxiliary":
        if norm is not None:
            raise ValueError(f"norm must be None for head='auxiliary', got {norm!r}")
        if pool_size not in (1, (1, 1)):
            raise ValueError(f"pool_size must be 1 for head='auxiliary', got {pool_size!r}")
        return AuxiliaryHeads(in_channels, num_classes, auxiliary_weight)
    if head in ("concat", "last"):
        return (ConcatHead if head == "concat" else LastHead)(in_channels, num_classes, pool_size=pool_size, norm=norm)
    raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {head!r}")
