"""The norm of a head's branches: a batch norm over p [B, D], and it folded into the layers behind it."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _options

NORMS = (None, "batch")
"""None: the source as written; "batch": nn.BatchNorm1d over the columns of p."""


def new_norm(norm: object, width: int, device: object, dtype: torch.dtype | None) -> nn.BatchNorm1d | None:
    """The module for the argument `norm`, for D = `width` columns; ValueError for another name."""
    if norm is not None and norm != "batch":
        raise ValueError(f"norm must be None or 'batch', got {_options.shown(norm)}")
    return None if norm is None else nn.BatchNorm1d(width, device=device, dtype=dtype)


def normalised(norm: nn.Module, pooled: Tensor, widths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """norm(p) in `dtype`, as the columns of each stage: p [B, D] -> n views [B, D_i]. ValueError for a batch of one in training."""
    if norm.training and pooled.shape[0] == 1 and isinstance(norm, nn.BatchNorm1d):
        raise ValueError("features must have a batch of at least 2 for norm='batch' in training, whose statistics are the batch's, got 1; eval() takes 1")
    return list(norm(pooled.to(dtype)).split(widths, 1))


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """s and t [D] in fp64 with norm(p) = s p + t in eval mode; ValueError where `norm` is no batch norm with running statistics."""
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None or norm.running_var is None:
        why = "no batch norm" if not isinstance(norm, _BatchNorm) else "without running statistics"
        raise ValueError(f"the head's norm must be a batch norm with running statistics to be folded, got {type(norm).__name__} ({why})")
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()
