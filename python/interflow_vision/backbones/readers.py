"""How the maps of the stages are got from a backbone: from what its forward returns, or from its submodules by hooks.

A reader is no module, so a backbone's parameters keep their names below `backbone.` whatever way was taken.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .exchange import Exchange


class Reader(Protocol):
    """Gives the maps of the stages, in their own layout."""

    def maps(self, backbone: nn.Module, x: Tensor) -> list[Tensor]:
        """Image [B, C, H, W] -> a map for each stage."""


def listed(output: Any) -> list[tuple[str, Any]] | None:
    """(name, map) of each map in what a forward returned, in order; None where it is no collection of maps.

    A list or tuple is taken as it is, a mapping by its values; of an object with `feature_maps` (Hugging Face) those.
    """
    output = getattr(output, "feature_maps", output)
    if isinstance(output, Mapping):
        return [(str(name), value) for name, value in output.items()]
    if isinstance(output, (list, tuple)):
        return [(str(i), value) for i, value in enumerate(output)]
    return None


class ReturnedMaps:
    """Maps that the backbone's forward returns: those at `places`, in this order; all of them for None."""

    def __init__(self, places: Sequence[int] | None = None) -> None:
        self.places = None if places is None else tuple(places)

    def maps(self, backbone: nn.Module, x: Tensor) -> list[Tensor]:
        output = backbone(x)
        found = listed(output)
        if found is None:
            kind = type(output).__name__
            raise ValueError(f"backbone must give a list, tuple or mapping of feature maps, got {kind}; name the submodules whose maps you want: stages=[...]")
        values = [value for _, value in found]
        return values if self.places is None else [values[i] for i in self.places]


class Catch:
    """A hook that hands over what a module gives (or takes, for a pre-hook), the first of several tensors."""

    def __init__(self, exchange: Exchange, stage: int) -> None:
        self.exchange, self.stage = exchange, stage

    def __call__(self, module: nn.Module, *given: Any) -> None:
        value = given[-1]  # a forward hook gets arguments and output, a pre-hook arguments
        self.exchange.put("map", self.stage, value[0] if isinstance(value, (tuple, list)) and value else value)


def uninstall(backbone: nn.Module, exchange: Exchange) -> None:
    """Takes the hooks of one exchange off a backbone again."""
    for module in backbone.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, Catch) and hook.exchange is exchange]:
                del hooks[number]


class HookedMaps:
    """Maps that forward hooks catch at submodules, `names`, while the backbone runs; the output of the backbone is dropped."""

    def __init__(self, exchange: Exchange, names: Sequence[str]) -> None:
        self.exchange, self.names = exchange, tuple(names)

    def install(self, backbone: nn.Module, before: Sequence[bool] | None = None) -> None:
        """Registers the hooks. before: for each stage, whether what the module takes is the map, not what it gives."""
        modules = dict(backbone.named_modules())
        for i, name in enumerate(self.names):
            catch = Catch(self.exchange, i)
            if before is not None and before[i]:
                modules[name].register_forward_pre_hook(catch)
            else:
                modules[name].register_forward_hook(catch)

    def maps(self, backbone: nn.Module, x: Tensor) -> list[Tensor]:
        parcel = self.exchange.open()
        try:
            backbone(x)
        finally:
            self.exchange.close()
        for (kind, stage), value in parcel.items():
            if kind != "map":  # for the network around this reader
                self.exchange.put(kind, stage, value)
        found: list[Tensor] = []
        for i, name in enumerate(self.names):
            if ("map", i) not in parcel:
                raise ValueError(f"stages: {name} did not run in the backbone's forward, so it has no map; name a submodule that does")
            found.append(parcel["map", i])
        return found


class Intermediates(nn.Module):
    """timm's `forward_intermediates` as a forward: maps of the blocks `indices`, tokens [B, N, C] where `layout` is NLC.

    keep: whether class tokens stay in front of the others. Parameters lie below `model.`, as in timm's FeatureGetterNet.
    """

    def __init__(self, model: nn.Module, indices: Sequence[int], layout: str, keep: bool = False) -> None:
        super().__init__()
        self.model = model
        self.indices = list(indices)
        self.output_fmt = layout
        self.keep = keep

    @property
    def dropped(self) -> int:
        """How many class tokens are left out."""
        return 0 if self.keep else int(getattr(self.model, "num_prefix_tokens", 0))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Image [B, C, H, W] -> maps."""
        options: dict[str, Any] = {"indices": self.indices, "output_fmt": self.output_fmt, "intermediates_only": True}
        model: Any = self.model
        if not self.keep:
            return list(model.forward_intermediates(x, **options))
        pairs = model.forward_intermediates(x, return_prefix_tokens=True, **options)
        return [_joined(pair) for pair in pairs]


def _joined(pair: Any) -> Tensor:
    """Class tokens in front of the others again, where there are any."""
    if isinstance(pair, Tensor):
        return pair
    tokens, prefix = pair
    return tokens if prefix is None else torch.cat([prefix, tokens], 1)
