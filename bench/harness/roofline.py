"""Bytes and operations that each operator cannot do without: formulas only."""

from collections.abc import Sequence
from dataclasses import dataclass

Map = tuple[int, int, int]  # C, H, W

HEAD_STAGES: tuple[Map, ...] = ((128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14))
"""VGG-16 at 224 pixels: the ends of its four stages, before the max-pool."""
BOUNDARIES: tuple[Map, ...] = ((64, 224, 224), *HEAD_STAGES)
"""All five ends of blocks; the last has no max-pool behind it in Interflow."""

RESNET_STAGES: tuple[Map, ...] = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
"""ResNet-50 at 224 pixels: the ends of its four stages, where a shortcut is added."""


def at_pixels(maps: Sequence[Map], pixels: int) -> tuple[Map, ...]:
    """The maps of a network that sees pixels x pixels instead of 224 x 224."""
    return tuple((c, h * pixels // 224, w * pixels // 224) for c, h, w in maps)


@dataclass(frozen=True)
class HeadShape:
    """maps (C, H, W) of each stage, K classes, B images, bytes an element."""

    maps: tuple[Map, ...]
    classes: int
    batch: int
    element: int

    @property
    def width(self) -> int:
        """D = sum C_i."""
        return sum(c for c, _, _ in self.maps)

    def map_bytes(self) -> int:
        return sum(self.batch * c * h * w * self.element for c, h, w in self.maps)

    def weight_bytes(self) -> int:
        return self.classes * self.width * self.element

    def forward_bytes(self) -> int:
        """Every map and W read once, y written once."""
        return self.map_bytes() + self.weight_bytes() + self.batch * self.classes * self.element

    def backward_bytes(self) -> int:
        """Read dy, W and the pooled features, write dW and dp: nothing of a map's size, the maps' gradients are stride-0 views."""
        return 2 * self.weight_bytes() + self.batch * (self.classes + 2 * self.width) * self.element

    def forward_flops(self) -> int:
        """An addition for each map element, a multiply-add for each of B * K * D."""
        return self.map_bytes() // self.element + 2 * self.batch * self.classes * self.width


@dataclass(frozen=True)
class TapShape:
    """Maps u (C, H, W) of the boundaries, whether each has a max-pool, B images, bytes an element."""

    maps: tuple[Map, ...]
    max_pool: tuple[bool, ...]
    batch: int
    element: int

    def map_bytes(self) -> int:
        """Of u."""
        return sum(self.batch * c * h * w * self.element for c, h, w in self.maps)

    def pooled_bytes(self) -> int:
        """Of m, and of its gradient."""
        return sum(self.batch * c * (h // 2) * (w // 2) * self.element for (c, h, w), m in zip(self.maps, self.max_pool, strict=True) if m)

    def mask_bytes(self) -> int:
        """A byte for each 2x2 window, a bit for each element without max-pool."""
        return sum(self.batch * c * (-(-h // 2) * -(-w // 2) if m else -(-h * w // 8)) for (c, h, w), m in zip(self.maps, self.max_pool, strict=True))

    def mean_bytes(self) -> int:
        """Of p, fp32."""
        return sum(self.batch * c * 4 for c, _, _ in self.maps)

    def forward_bytes(self, training: bool) -> int:
        """Read u; write m and p, and while training the mask."""
        return self.map_bytes() + self.pooled_bytes() + self.mean_bytes() + (self.mask_bytes() if training else 0)

    def backward_bytes(self) -> int:
        """Read dm, dp and the mask; write du."""
        return self.map_bytes() + self.pooled_bytes() + self.mean_bytes() + self.mask_bytes()


@dataclass(frozen=True)
class EndShape:
    """Maps u (C, H, W) of the stages, B images, bytes an element, whether a residual is added, whether relu masks."""

    maps: tuple[Map, ...]
    batch: int
    element: int
    residual: bool
    relu: bool

    def map_bytes(self) -> int:
        """Of u, of v, of the residual."""
        return sum(self.batch * c * h * w * self.element for c, h, w in self.maps)

    def mean_bytes(self) -> int:
        """Of p, fp32."""
        return sum(self.batch * c * 4 for c, _, _ in self.maps)

    def forward_bytes(self) -> int:
        """Read u and the residual; write v and p."""
        return (3 if self.residual else 2) * self.map_bytes() + self.mean_bytes()

    def backward_bytes(self) -> int:
        """Read dv, dp, and v where it masks; write du, which is the residual's gradient too."""
        return (3 if self.relu else 2) * self.map_bytes() + self.mean_bytes()
