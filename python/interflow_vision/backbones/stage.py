"""What is known of a stage: its name, channels, reduction and the layout of its map; and how a map becomes [B, C, H, W]."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

LAYOUTS = ("NCHW", "NHWC", "NLC", "NCL")
"""[B, C, H, W], [B, H, W, C], tokens [B, N, C] and [B, C, N]; timm's names."""


@dataclass(frozen=True)
class Stage:
    """One stage of a backbone.

    name: of the module or node that gives its map, or its index.  channels: C_i.  reduction: sides of the image over sides
    of the map, None for tokens.  layout: one of LAYOUTS.  skipped: how many tokens in front are left out of the mean.
    """

    name: str
    channels: int
    reduction: int | None
    layout: str = "NCHW"
    skipped: int = 0

    def as_map(self, x: Tensor) -> Tensor:
        """The stage's map as [B, C, H, W], tokens as [B, C, N, 1], pooled values [B, C] as they are; nothing is copied."""
        if x.dim() == 2:
            return x
        if self.layout == "NHWC":
            return x.permute(0, 3, 1, 2)
        if self.layout == "NLC":
            return x[:, self.skipped :].transpose(1, 2).unsqueeze(3)
        if self.layout == "NCL":
            return x[:, :, self.skipped :].unsqueeze(3)
        return x

    def as_info(self) -> dict[str, Any]:
        """An entry of feature_info, as timm writes it."""
        return {"num_chs": self.channels, "reduction": self.reduction, "module": self.name}


def layout_name(given: Any) -> str:
    """One of LAYOUTS from timm's `output_fmt`, an enum or a string; NCHW where there is none."""
    name = str(getattr(given, "value", given or "NCHW"))
    return name if name in LAYOUTS else "NCHW"


def channel_dimension(layout: str) -> int:
    """Where a map of this layout has its channels."""
    return -1 if layout in ("NHWC", "NLC") else 1
