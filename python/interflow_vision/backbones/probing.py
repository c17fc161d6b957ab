"""The dry run: one forward of one image through a backbone, that leaves the backbone as it was and tells what its maps are."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import one_line
from .readers import Reader
from .stage import LAYOUTS, Stage, channel_dimension

DEFAULT_SIDE = 224
"""Pixels a side where the backbone says nothing."""


def default_cfg(backbone: nn.Module) -> dict[str, Any]:
    """timm's description of the backbone, empty where there is none."""
    for module in (backbone, getattr(backbone, "model", None)):
        cfg = getattr(module, "default_cfg", None)
        if isinstance(cfg, Mapping):
            return dict(cfg)
    return {}


def image_size(backbone: nn.Module, given: Any = None) -> tuple[int, int, int]:
    """(C, H, W) of the dry run's image: what was given, else default_cfg["input_size"], else the first convolution's channels at 224 pixels."""
    if isinstance(given, int) and not isinstance(given, bool) and given >= 1:
        return _channels(backbone), given, given
    if given is not None:
        asked = tuple(given) if isinstance(given, (list, tuple)) else ()
        if len(asked) != 3 or not all(isinstance(s, int) and not isinstance(s, bool) and s >= 1 for s in asked):
            raise ValueError(f"input_size must be pixels of a side or (C, H, W), whole numbers of at least 1, got {given!r}")
        return asked
    size = default_cfg(backbone).get("input_size")
    side: Sequence[int] = size[1:] if isinstance(size, (list, tuple)) and len(size) == 3 else (DEFAULT_SIDE, DEFAULT_SIDE)
    embed = getattr(getattr(backbone, "model", backbone), "patch_embed", None)
    built = getattr(embed, "img_size", None)  # timm's transformers keep the size that they were built for
    if isinstance(built, (list, tuple)) and len(built) == 2:
        side = built
    return _channels(backbone), int(side[0]), int(side[1])


def _channels(backbone: nn.Module) -> int:
    """Channels of the image by timm's own word, else those of the first convolution, which a front end like csatv2's may precede."""
    for module in (backbone, getattr(backbone, "model", None)):
        told = getattr(module, "in_chans", None)
        traits = getattr(module, "_traits", None)
        told = traits.get("in_chans") if told is None and isinstance(traits, Mapping) else told
        if isinstance(told, int):
            return told
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def image(backbone: nn.Module, size: Sequence[int]) -> Tensor:
    """One random image [1, C, H, W], the same in every call, on the backbone's device and in its dtype."""
    like = next((p for p in (*backbone.parameters(), *backbone.buffers()) if p.is_floating_point()), torch.empty(0))
    x = torch.randn(1, *size, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return x.to(device=like.device, dtype=like.dtype)


@contextmanager
def undisturbed(backbone: nn.Module) -> Iterator[None]:
    """Inside it the backbone is in eval mode and nothing is recorded for backward; after it every module has the mode that it had.

    In eval mode no batch norm changes its statistics; random numbers that a forward draws are given back.
    """
    modes = [(module, module.training) for module in backbone.modules()]
    devices = sorted({p.device.index or 0 for p in backbone.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices), torch.no_grad():
        try:
            backbone.eval()
            yield
        finally:
            backbone.train(modes[0][1])  # a module may do more in train() than set a flag
            for module, mode in modes:
                module.training = mode


@dataclass
class Seen:
    """What a dry run has seen: the maps, and the outputs of each submodule, by its name, a call each; of the backbone itself under ""."""

    maps: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Any]] = field(default_factory=dict)


def run(reader: Reader, backbone: nn.Module, size: Sequence[int]) -> Seen:
    """One image through the backbone; ValueError where it cannot run on it or gives no maps."""
    seen = Seen()

    def note(name: str) -> Any:
        return lambda module, args, output: seen.outputs.setdefault(name, []).append(output)

    handles = [module.register_forward_hook(note(name)) for name, module in backbone.named_modules()]
    try:
        with undisturbed(backbone):
            seen.maps = reader.maps(backbone, image(backbone, size))
    except ValueError as error:
        if str(error).startswith(("backbone must", "stages")):
            raise
        raise _cannot_run(size, error) from error
    except Exception as error:  # whatever a backbone's own code raises
        raise _cannot_run(size, error) from error
    finally:
        for handle in handles:
            handle.remove()
    for i, x in enumerate(seen.maps):
        if not isinstance(x, Tensor):
            raise ValueError(f"backbone must give tensors as its maps, got {type(x).__name__} as number {i}; choose others with stages=[...]")
        if x.dim() not in (2, 3, 4) or not x.is_floating_point():
            raise ValueError(f"backbone must give maps [B, C, H, W] or tokens [B, N, C], got {x.dtype} of shape {tuple(x.shape)} as number {i}")
    if not seen.maps:
        raise ValueError("backbone must give at least one feature map, got none; name the submodules whose maps you want: stages=[...]")
    return seen


def _cannot_run(size: Sequence[int], error: Exception) -> ValueError:
    cause = one_line(error)
    return ValueError(f"backbone cannot run on an image of shape {[1, *size]} ({cause[:200]}); give input_size=(C, H, W) of the images that it takes")


def described(
    maps: Sequence[Tensor],
    names: Sequence[str],
    layouts: Sequence[str],
    size: Sequence[int],
    *,
    channels: Sequence[int] | None = None,
    reductions: Sequence[int] | None = None,
    tokens: int = 0,
) -> list[Stage]:
    """A Stage for each map. What the backbone says of itself holds; only what it leaves open is read from the dry run's maps.

    layouts: of each map, never guessed from its shape, but that three dimensions are tokens.  channels, reductions: of
    feature_info.  tokens: how many class tokens in front are left out.
    """
    stages = []
    for i, x in enumerate(maps):
        layout = layouts[i]
        if x.dim() == 3:
            layout = "NCL" if layout == "NCL" else "NLC"
        elif layout not in ("NCHW", "NHWC"):
            layout = "NCHW"
        found = x.shape[channel_dimension(layout)]
        if channels is not None and channels[i] != found:
            told = f"the backbone says that stage {names[i]} has {channels[i]} channels, but its map is {list(x.shape)} as {layout}"
            raise ValueError(f"{told}; give the layout that it has: layout={' or '.join(repr(name) for name in LAYOUTS[:2])}")
        reduction = None if reductions is None else reductions[i]
        if reduction is None and x.dim() == 4:
            reduction = round(size[1] / x.shape[1 if layout == "NHWC" else 2])
        stages.append(Stage(names[i], int(found), reduction, layout, tokens if layout in ("NLC", "NCL") else 0))
    return stages
