"""The end of a stage: the module StageTap, and conv_tap, which decides whether a convolution leaves its bias to it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from .. import _fx, _options, _tracing
from ..functional import stage_tap
from .plain import is_plain, plain_tensor


class StageTap(nn.Module):
    """Bias, ReLU, 2x2 max-pool and mean in one pass over a convolution's output; see stage_tap. No parameters.

    `tap(u)` is for a u that has its bias already, as every convolution gives it; conv_tap saves that pass where it can.

    Args:
        max_pool: whether m is wanted; False is the form of a last stage, of which only the mean is used.

    Shapes: u [B, C, H, W], shift [C] -> m [B, C, H // 2, W // 2] (None without max_pool), p [B, C].
    """

    def __init__(self, max_pool: bool = True) -> None:
        super().__init__()
        self.max_pool = _options.flag(max_pool, "max_pool")

    def forward(self, u: Tensor, shift: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """u, and a shift that u still lacks or None -> m or None, p."""
        if isinstance(u, Proxy):
            return _fx.leaf(self, u, shift)
        return stage_tap(u, shift, max_pool=self.max_pool)

    __prepare_scriptable__ = _tracing.no_script

    def extra_repr(self) -> str:
        return f"max_pool={self.max_pool}"


_CONV_FORWARD: Any = nn.Conv2d._conv_forward
_TAP_FORWARD: Any = StageTap.forward


def conv_tap(conv: Any, tap: nn.Module, x: Tensor) -> Any:
    """tap(conv(x)), in one pass less where the convolution can leave adding its bias to the tap.

        tap(conv without its bias (x), conv.bias)    if conv is exactly an nn.Conv2d and tap exactly a StageTap
        tap(conv(x))                                 in every other case

    "Exactly": the class itself, no hooks (of the module or of all modules), no wrapper, no parametrization, no forward of
    its own, weight and bias plain tensors. So checkpoint wrappers, torch.compile, LoRA, FSDP, pruning, weight norm and
    hooks do and see what they would without a tap; both ways give the same, but for rounding.

    Shapes: x [B, C_in, H, W] -> with a StageTap m [B, C, H' // 2, W' // 2] or None, p [B, C]; else what `tap` returns.
    Raises what the two modules raise.
    """
    if (
        isinstance(x, Tensor)  # not a proxy of FX, for which both stay modules in its graph
        and is_plain(conv, nn.Conv2d)
        and is_plain(tap, StageTap)
        and plain_tensor(conv.weight)
        and plain_tensor(conv.bias)
        and nn.Conv2d._conv_forward is _CONV_FORWARD
        and StageTap.forward is _TAP_FORWARD
    ):
        u, shift = conv._conv_forward(x, conv.weight, None), conv.bias
        if shift.dtype not in (u.dtype, torch.float32):  # autocast to another dtype than the bias's, which the convolution would have cast too
            shift = shift.to(u.dtype)
        return tap(u, shift)
    return tap(conv(x))
