"""What the operators that pool know of their features: pooled widths, and the way back from pooled gradients to a feature's shape."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._tap_format import is_channels_last


def pooled_width(x: Tensor, pool_size: Sequence[int]) -> Any:
    """D_i of a feature [B, C, H, W] or [B, D_i]."""
    return x.shape[1] * pool_size[0] * pool_size[1] if x.dim() == 4 else x.shape[1]


def remember_features(ctx: Any, pool_size: Sequence[int], features: Sequence[Tensor]) -> None:
    """Of the features only what their gradients' shape and layout need."""
    ctx.pool_size = list(pool_size)
    ctx.widths = [pooled_width(x, pool_size) for x in features]
    ctx.shapes = [x.shape for x in features]
    ctx.dtypes = [x.dtype for x in features]
    ctx.channels_last = [x.dim() == 4 and is_channels_last(x) for x in features]


def feature_gradients(ctx: Any, dp: Tensor) -> list[Tensor | None]:
    """dp [B, D] -> the gradient of each feature in ctx.feature_stages, None for the others."""
    found: list[Tensor | None] = [None] * len(ctx.shapes)
    if ctx.feature_stages:
        parts = dp.split(ctx.widths, 1)
        for i in ctx.feature_stages:
            found[i] = _feature_gradient(parts[i], ctx.shapes[i], ctx.dtypes[i], ctx.channels_last[i], ctx.pool_size)
    return found


def _feature_gradient(dp: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool, pool_size: Sequence[int]) -> Tensor:
    """dp [B, D_i] -> the gradient of a feature [B, C, H, W] or [B, D_i]. With one bin it is expanded, stride 0 over H and W."""
    if len(shape) == 2:
        return dp.to(dtype)
    batch, channels, height, width = shape
    if channels == 0:  # PyTorch's backward refuses it
        return dp.new_empty(tuple(shape), dtype=dtype)
    if pool_size[0] == 1 and pool_size[1] == 1:
        return (dp / (height * width)).to(dtype)[:, :, None, None].expand(batch, channels, height, width)
    if hasattr(dp, "device_mesh"):
        return _on_shards(dp, shape, dtype, channels_last, pool_size)
    # Overlapping windows: PyTorch's own backward, which reads nothing but the shape of its second argument.
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    like = torch.empty(tuple(shape), dtype=dp.dtype, device=dp.device, memory_format=memory_format)
    bins = dp.reshape(batch, channels, pool_size[0], pool_size[1])
    return torch.ops.aten._adaptive_avg_pool2d_backward(bins, like).to(dtype)


def _on_shards(dp: Any, shape: Sequence[int], dtype: torch.dtype, channels_last: bool, pool_size: Sequence[int]) -> Tensor:
    """The same of a DTensor, for which PyTorch's backward has no rule: on each shard of images, or on each term of a sum, as it is linear in dp."""
    from torch.distributed.tensor import DTensor, Replicate

    kept = [p if p.is_partial() or getattr(p, "dim", 0) == 0 else Replicate() for p in dp.placements]
    local = dp.redistribute(dp.device_mesh, kept).to_local()
    found = _feature_gradient(local, (local.shape[0], *shape[1:]), dtype, channels_last, pool_size)
    whole = torch.empty(tuple(shape), device="meta", memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return DTensor.from_local(found, dp.device_mesh, kept, run_check=False, shape=whole.shape, stride=whole.stride())
