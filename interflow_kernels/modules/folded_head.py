"""An Interflow head folded for inference."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from .. import _fx, _options, _tracing, _validate, functional, reference


class FoldedInterflowHead(nn.Module):
    """An InterflowHead folded for inference: y = sum_i p_i W'_i^T + b'. Its weights are buffers; features are differentiated.

    Args:
        in_channels: C_i of each stage.
        weight: W' [K, D].
        bias: b' [K].
        pool_size: as InterflowHead.
        layout: as InterflowHead.
        fused: whether the fused kernel runs.

    Shapes and errors: as InterflowHead.
    """

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]

    def __init__(
        self,
        in_channels: Sequence[int],
        weight: Tensor,
        bias: Tensor,
        pool_size: int | tuple[int, int] = 1,
        layout: str | Sequence[str] = "NCHW",
        *,
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = _options.positive_ints(in_channels, "in_channels")
        self.pool_size = _options.pair(pool_size, "pool_size")
        self.layout = _options.layouts(layout, len(self.in_channels))
        _options.stage_count(len(self.in_channels), "in_channels")
        self.fused = _options.flag(fused, "fused")
        _validate.folded(weight, bias, sum(self.in_channels) * self.pool_size[0] * self.pool_size[1])
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", bias.detach())

    def forward(self, features: Sequence[Tensor] | Mapping[str, Tensor]) -> Tensor:
        """n features -> logits y [B, K]."""
        try:
            checked = _validate.features(features, self.weight, len(self.in_channels), self.pool_size, self.layout, self.in_channels)
        except TypeError:
            return _fx.leaf(self, features)
        if self.fused:
            return functional.run_head(checked, self.weight, None, None, self.bias, "folded", self.pool_size, False)[0]
        return reference.interflow_head(checked, self.weight, None, None, self.bias, "folded", self.pool_size)[0]

    __prepare_scriptable__ = _tracing.no_script

    def extra_repr(self) -> str:
        return f"in_channels={self.in_channels}, weight={list(self.weight.shape)}, bias={list(self.bias.shape)}, fused={self.fused}"
