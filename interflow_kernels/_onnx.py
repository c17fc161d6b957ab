"""Every forward operator in PyTorch operators that ONNX has too, for any batch and image size: what torch.onnx.export records of us.

The values are the reference's. What differs is how they are written: adaptive windows as means of slices, or where H and W are not known
as products with matrices of weights, since ONNX has no adaptive pooling; sums in fp32 or wider, as the kernels have them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def _window_means(bins: int, size: Any, like: Tensor) -> Tensor:
    """A [bins, size]: row s has 1 / length in the columns of the s-th adaptive window of `size`, 0 elsewhere. p = A x is the pooled x."""
    s = torch.arange(bins, device=like.device)
    first, end = s * size // bins, ((s + 1) * size + bins - 1) // bins
    column = torch.arange(size, device=like.device)
    inside = (column >= first[:, None]) & (column < end[:, None])
    return inside.to(like.dtype) / (end - first).to(like.dtype)[:, None]


def _pooled(x: Tensor, pool_size: Sequence[int]) -> Tensor:
    """[B, C, H, W] -> [B, C * Sh * Sw], each adaptive window averaged; [B, D_i] as it is."""
    if x.dim() == 2 or x.shape[1] == 0:
        return x.flatten(1)
    rows, columns = pool_size
    if rows == 1 and columns == 1:
        return x.mean((2, 3))
    height, width = x.shape[2], x.shape[3]
    if type(height) is int and type(width) is int:
        windows = [
            x[:, :, i * height // rows : -(-(i + 1) * height // rows), j * width // columns : -(-(j + 1) * width // columns)].mean((2, 3))
            for i in range(rows)
            for j in range(columns)
        ]
        return torch.stack(windows, 2).flatten(1)
    # A NaN or an infinity reaches all windows of its channel here.
    return (_window_means(rows, height, x) @ x @ _window_means(columns, width, x).T).flatten(1)


def interflow_head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: Sequence[int],
    need_branches: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: y [B, K], branches [B, n, K] or [0], pooled [B, D]."""
    dtype = weight.dtype if dtype is None else dtype
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    means = [_pooled(x.to(wide), pool_size) for x in features]
    pooled = torch.cat(means, 1) if len(means) > 1 else means[0]
    weight, bias, attention_weight, attention_bias = (None if t is None else t.to(wide) for t in (weight, bias, attention_weight, attention_bias))  # type: ignore[assignment]
    if attention == "folded" and not need_branches and bias is None:  # one product instead of n
        return F.linear(pooled, weight, attention_bias).to(dtype), pooled.new_empty((0,), dtype=dtype), pooled
    scores = reference.branch_scores(means, weight, bias, (1, 1))
    y = reference.aggregate(scores, attention, attention_weight, attention_bias)
    return y.to(dtype), scores.to(dtype) if need_branches else pooled.new_empty((0,), dtype=dtype), pooled


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool, need_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The operator: m [B, C, H // 2, W // 2] or [0], p [B, C], and no mask, which only backward reads."""
    m, p = reference.stage_tap(u, shift, max_pool)
    return u.new_empty((0,)) if m is None else m, p, u.new_empty((0,), dtype=torch.uint8)


def interflow_pool(features: Sequence[Tensor], pool_size: Sequence[int]) -> Tensor:
    """The operator: pooled [B, D]."""
    wide = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    return torch.cat([_pooled(x.to(wide), pool_size) for x in features], 1)


def stage_end(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    """The operator: v [B, C, H, W] and p [B, C]."""
    return reference.stage_end(u, shift, residual, activation)


TRANSLATIONS: dict[str, Callable[..., Any]] = {
    "interflow_head": interflow_head,
    "interflow_pool": interflow_pool,
    "stage_tap": stage_tap,
    "stage_end": stage_end,
}
"""By operator. Backward operators have none: what is exported to ONNX is not trained."""
