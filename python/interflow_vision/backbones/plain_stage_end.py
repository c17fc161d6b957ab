"""The end of a stage that passes its map on: the operator `stage_end` of interflow_kernels, or the same in plain PyTorch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import interflow_kernels


def _plain(u: Tensor, shift: Tensor | None = None, residual: Tensor | None = None, *, activation: str = "relu") -> tuple[Tensor, Tensor]:
    """v = act(u + shift + residual) in u's shape and dtype, p = mean of v over H, W: [B, C], fp32 for bf16 and fp16."""
    v = u if shift is None else u + shift.to(u.dtype)[:, None, None]
    v = v if residual is None else v + residual
    v = F.relu(v) if activation == "relu" else v
    return v, v.mean((2, 3), dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)


stage_end: Any = getattr(interflow_kernels, "stage_end", _plain)
