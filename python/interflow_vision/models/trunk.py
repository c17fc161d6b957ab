"""The layers of a VGG by name, what stands for what among them, and how they are run from an image to the features of the stages."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, fx, nn

from interflow_kernels import StageTap

from .checkpointing import recomputed
from .stages import run_end, run_end_for_map, run_relu
from .wrappers import unwrapped


@dataclass(frozen=True)
class Place:
    """What stands at a place, whatever module a user has put there since: a wrapped one, or another.

    role: an "end" gives the next layer's input and a feature, every other layer its output.
    max_pool: whether an end halves the map.  feature: whether an end's feature is one of the trunk's, the end of a stage.
    """

    role: Literal["convolution", "norm", "relu", "end"]
    max_pool: bool = False
    feature: bool = False


class Trunk(nn.ModuleDict):
    """Layers in a row, each with its place. Names are torchvision's: numbers that count a max-pool, which is part of an end here, as a layer.

    Shapes: image [B, C, H, W] -> of each stage the mean [B, C_i] where a tap ends it, else its map [B, C_i, H_i, W_i]; with
    `maps` the map of each. The last feature is the map behind the max-pool if its end has one.
    """

    def __init__(self, layers: Iterable[tuple[Place, nn.Module]]) -> None:
        super().__init__()
        self.places: dict[str, Place] = {}
        self.checkpointed = False
        """Whether training runs each block again in backward in place of keeping its maps, see checkpointing.py."""
        index = 0
        for place, layer in layers:
            self[str(index)] = layer
            self.places[str(index)] = place
            index += 2 if place.max_pool else 1

    def placed(self) -> list[tuple[str, Place, nn.Module]]:
        """Name, place and module of each layer."""
        return [(name, self.places[name], layer) for name, layer in self.items()]

    def forward(self, x: Tensor, maps: bool = False) -> list[Tensor]:
        """Image -> the features of the stages."""
        if not (self.checkpointed and self.training and torch.is_grad_enabled()):
            return self._run(self.placed(), x, maps)[1]
        features: list[Tensor] = []
        for block in self._blocks():
            x, found = recomputed(partial(self._run, block, maps=maps), x, [layer for _, _, layer in block])
            features += found
        return features

    def _blocks(self) -> list[list[tuple[str, Place, nn.Module]]]:
        """The layers in pieces that end where blocks and stages do."""
        blocks: list[list[tuple[str, Place, nn.Module]]] = [[]]
        for name, place, layer in self.placed():
            blocks[-1].append((name, place, layer))
            if place.role == "end":
                blocks.append([])
        return [block for block in blocks if block]

    def _run(self, layers: list[tuple[str, Place, nn.Module]], x: Tensor, maps: bool) -> tuple[Tensor, list[Tensor]]:
        """Runs these layers, which end where a block does; what follows takes and the features among them."""
        features: list[Tensor] = []
        last = list(self.places)[-1]
        before: nn.Module | None = None  # is run together with what follows, which may take work off it
        for name, place, layer in layers:
            if place.role == "end":
                x, feature = self._end(name, place, before, layer, x, maps)
                if place.feature:
                    features.append(x if place.max_pool and name == last else feature)
                before = None
            elif place.role == "relu":
                x, before = run_relu(before, layer, x), None
            else:
                x, before = (x if before is None else before(x)), layer
        return x, features

    def _end(self, name: str, place: Place, before: nn.Module | None, end: nn.Module, x: Tensor, maps: bool) -> tuple[Tensor, Tensor]:
        if maps and isinstance(unwrapped(end), StageTap):
            return run_end_for_map(before, place.max_pool, x)
        given = run_end(before, end, x)
        if isinstance(given, fx.Proxy):
            return given[0], given[1]  # type: ignore[index]
        if not isinstance(given, (tuple, list)) or len(given) != 2:
            wanted = "must give the next layer's input and the stage's feature, as StageTap and EagerStageEnd do"
            raise ValueError(f"features.{name} {wanted}, got {type(given).__name__} from {type(end).__name__}")
        if maps and place.feature and given[1].dim() != 4:
            raise ValueError(f"features.{name} ({type(end).__name__}) gives no map of its stage, but shape {tuple(given[1].shape)}")
        return given[0], given[1]
