"""The end of a stage as modules: StageTap, and the convolution that leaves its bias to it."""

from torch import Tensor, nn
from torch.fx import Proxy

from .. import _fx, _options, _tracing
from ..functional import stage_tap


class StageTap(nn.Module):
    """Bias, ReLU, 2x2 max-pool and mean in one pass over a convolution's output; see stage_tap. No parameters.

    Args:
        max_pool: whether m is wanted; False is the form of a last stage, of which only the mean is used.

    Shapes: u [B, C, H, W], shift [C] -> m [B, C, H // 2, W // 2] (None without max_pool), p [B, C].
    """

    def __init__(self, max_pool: bool = True) -> None:
        super().__init__()
        self.max_pool = _options.flag(max_pool, "max_pool")

    def forward(self, u: Tensor, shift: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        """u, shift -> m or None, p."""
        if isinstance(u, Proxy):
            return _fx.leaf(self, u, shift)
        return stage_tap(u, shift, max_pool=self.max_pool)

    __prepare_scriptable__ = _tracing.no_script

    def extra_repr(self) -> str:
        return f"max_pool={self.max_pool}"


class TapConv2d(nn.Conv2d):
    """nn.Conv2d whose forward leaves the bias out: give `bias` to the StageTap behind it, `tap(conv(x), conv.bias)`.

    Parameters, their names and initial values are nn.Conv2d's, so `state_dict` is too. A pass over the map is saved where
    the bias would be added in one of its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C_in, H, W] -> the convolution without bias, [B, C_out, H', W']."""
        return self._conv_forward(x, self.weight, None)
