"""The end of a stage that passes its map on: the module StageEnd."""

from torch import Tensor, nn
from torch.fx import Proxy

from .. import _fx, _options, _tracing
from ..functional import stage_end


class StageEnd(nn.Module):
    """Bias, shortcut, activation and mean in one pass over a map that the network goes on with; see stage_end. No parameters.

    Args:
        activation: "relu", or "none" where the stage ends without one and only its mean is wanted beside it.

    Shapes: u [B, C, H, W], shift [C], residual [B, C, H, W] -> v [B, C, H, W], p [B, C].
    """

    def __init__(self, activation: str = "relu") -> None:
        super().__init__()
        self.activation = _options.activation_name(activation)

    def forward(self, u: Tensor, shift: Tensor | None = None, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u, a shift that u still lacks or None, what the shortcut adds or None -> v, p."""
        if isinstance(u, Proxy):
            return _fx.leaf(self, u, shift, residual)
        return stage_end(u, shift, residual, activation=self.activation)

    __prepare_scriptable__ = _tracing.no_script

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
