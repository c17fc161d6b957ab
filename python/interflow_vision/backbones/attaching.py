"""`attach`: from any backbone to a network with an Interflow head, in one line."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from interflow_kernels import _options

from ..models.heads import HEADS, create_head
from . import choosing, probing, stage_ends, timm_backbones, torchvision_backbones
from .exchange import Exchange
from .network import InterflowNetwork
from .readers import HookedMaps, Intermediates, Reader, ReturnedMaps, listed, uninstall
from .stage import LAYOUTS, Stage

_HEAD_OPTIONS = frozenset(inspect.signature(create_head).parameters) - {"head", "in_channels", "num_classes", "attention", "pool_size"}
STAGE_ENDS = ("fused", "eager")


def attach(
    backbone: nn.Module | str,
    num_classes: int,
    *,
    attention: str = "nxn",
    stages: Sequence[int] | Sequence[str] | None = None,
    head: str = "fused",
    pool_size: int | tuple[int, int] = 1,
    drop_class_token: bool = True,
    stage_end: str = "fused",
    layout: str | Sequence[str] | None = None,
    input_size: int | tuple[int, int, int] | None = None,
    **options: Any,
) -> InterflowNetwork:
    """A network of a backbone and an Interflow head on the maps of its stages.

        attach("resnet50", 10, pretrained=True)                       # timm's, by name
        attach("torchvision/resnet50", 10)                            # torchvision's, by name
        attach(torchvision.models.resnet50(), 10)                     # its stages are built in; else stages=[node names of torch.fx]
        attach(fpn, 10)                                               # a forward that returns a list, tuple or dict of maps, or `feature_maps`
        attach(net, 10, stages=["down2", "down3", "down4"])           # any module, by the names of submodules

    Args:
        backbone: one of these. A module is used as it is, not copied.
        num_classes: K; 0 for no classifier.
        attention: as InterflowHead.
        pool_size: as InterflowHead.
        stages: indices or names, in the order in which the head takes them; default: the last four maps that the backbone has
            (of blocks that keep their size, as in ViT, four evenly spread).
        head: "fused", "eager", "auxiliary", "concat" or "last", see models/heads.py.
        drop_class_token: of tokens [B, N, C], whether class and register tokens are left out of the mean of a stage; False
            takes them as tokens like the others.
        stage_end: "fused" lets a stage that ends in a ReLU give the mean with its map (network.replaced says where), only
            where a dry run shows the same numbers; "eager" leaves the backbone as it is.
        layout: "NCHW", "NHWC" or one of them for each stage, where the backbone does not say it (`output_fmt`, default "NCHW").
            Three dimensions are tokens. It is never guessed from sizes.
        input_size: of the dry run's image, (C, H, W) or pixels of a side; default: default_cfg["input_size"], else 224 pixels.
        options: of the head (attention_bias, hard_weights, auxiliary_weight, ...); for a name, all others go to
            timm.create_model or torchvision.models.get_model (pretrained, in_chans, img_size, ...).

    The dry run is one image in eval mode without gradients: no statistic changes, and every module keeps its mode. A map that the
    backbone writes over after its stage (an in-place ReLU behind a convolution) is taken as it is then.

    Raises ValueError or TypeError, one sentence with the nearest valid names, for what does not fit; MissingPackageError, with the line
    that installs it, for a name without its library.
    """
    _check(num_classes, head, stage_end, pool_size, drop_class_token, layout, attention)
    chosen = choosing.requested(stages)
    head_options = {name: options.pop(name) for name in list(options) if name in _HEAD_OPTIONS}
    weights: Any = None
    if isinstance(backbone, str):
        given = {**options, "pretrained": bool(options.get("pretrained", False))}
        weights = {"name": backbone, "stages": chosen, "keep": not drop_class_token, "options": {**given, "pretrained": True}}
        backbone = _by_name(backbone, chosen, not drop_class_token, given)
    elif not isinstance(backbone, nn.Module):
        raise TypeError(f"backbone must be an nn.Module or the name of a model of timm or torchvision, got {_options.shown(backbone)}")
    elif options:
        valid = ", ".join(sorted(_HEAD_OPTIONS))
        raise TypeError(f"attach has no argument {next(iter(options))!r} for a backbone that is a module; those of the head are {valid}")
    size = probing.image_size(backbone, input_size)
    exchange = Exchange()
    try:
        module, reader, described, seen = _opened(backbone, chosen, weights is not None, drop_class_token, layout, size, exchange)
        network = InterflowNetwork(
            module, reader, described, num_classes, head=head, head_options={"attention": attention, "pool_size": pool_size, **head_options},
            exchange=exchange, default_cfg={**probing.default_cfg(backbone), "input_size": size},
        )  # fmt: skip
    except Exception:
        uninstall(backbone, exchange)
        raise
    network._pretrained = None if weights is None else _Weights(**weights, size=size)
    if stage_end == "fused" and network.pool_size == (1, 1):
        stage_ends.install(network, seen)
    network.head.train(module.training)
    network.training = module.training  # the backbone's modules keep the modes that they have
    return network


def _check(num_classes: Any, head: Any, stage_end: Any, pool_size: Any, drop_class_token: Any, layout: Any, attention: Any) -> None:
    if _options.integer(num_classes) != 0:
        _options.class_count(num_classes)
    _options.pair(pool_size, "pool_size")
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(map(repr, HEADS))}, got {_options.shown(head)}")
    if stage_end not in STAGE_ENDS:
        raise ValueError(f"stage_end must be one of {', '.join(map(repr, STAGE_ENDS))}, got {_options.shown(stage_end)}")
    _options.flag(drop_class_token, "drop_class_token")
    _options.attention_mode(attention)
    each = [] if layout is None else [layout] if isinstance(layout, str) else list(layout)
    for name in each:
        if name not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}, got {_options.shown(name)}")


def _by_name(name: str, chosen: list[int] | list[str] | None, keep: bool, options: dict[str, Any]) -> nn.Module:
    """A new backbone: torchvision's for "torchvision/NAME", else timm's."""
    if name.startswith("torchvision/"):
        return torchvision_backbones.build(name.removeprefix("torchvision/"), options)
    if chosen and isinstance(chosen[0], str):
        raise ValueError(f"stages must be indices for timm's {name}, got {chosen!r}; give the module timm.create_model({name!r}) to choose submodules by name")
    return timm_backbones.build(name, chosen, keep, options)  # type: ignore[arg-type]


Opened = tuple[nn.Module, Reader, list[Stage], probing.Seen]


def _opened(backbone: nn.Module, chosen: Any, named: bool, drop: bool, layout: Any, size: Sequence[int], exchange: Exchange) -> Opened:
    """The module to run, how its maps are read, and what its stages are."""
    by_name = bool(chosen) and isinstance(chosen[0], str)
    if torchvision_backbones.family(backbone) is not None or (by_name and type(backbone).__module__.startswith("torchvision.")):
        return _torchvision(backbone, chosen, drop, layout, size, exchange)
    if by_name:
        return _hooked(backbone, chosen, None, drop, layout, size, exchange)
    info = None if named or isinstance(backbone, Intermediates) else timm_backbones.submodules(backbone)
    if info is not None and not _returns_maps(backbone, size):
        pooled = isinstance(backbone.get_submodule(info[-1]["module"]), nn.MaxPool2d)  # timm's VGG; Interflow has no pool5
        reductions = [entry["reduction"] for entry in info]
        picked = choosing.default_places(len(info) - pooled, reductions) if chosen is None else choosing.places(chosen, len(info))
        return _hooked(backbone, [info[i]["module"] for i in picked], [info[i] for i in picked], drop, layout, size, exchange)
    return _returned(backbone, chosen, named, drop, layout, size)


def _returns_maps(backbone: nn.Module, size: Sequence[int]) -> bool:
    with probing.undisturbed(backbone):
        return listed(backbone(probing.image(backbone, size))) is not None


def _returned(backbone: nn.Module, chosen: list[int] | None, named: bool, drop: bool, layout: Any, size: Sequence[int]) -> Opened:
    """A backbone whose forward returns its maps. named: it was built with the chosen stages already."""
    seen = probing.run(ReturnedMaps(), backbone, size)
    count = len(seen.maps)
    if (named and chosen is not None) or isinstance(backbone, Intermediates):
        places = tuple(range(count))
    else:
        places = choosing.default_places(count - _ends_in_pooling(backbone, seen)) if chosen is None else choosing.places(chosen, count)
    info = timm_backbones.entries(backbone)
    known = info if info is not None and len(info) == count else None
    returned = listed(seen.outputs[""][0]) or []
    names = [str(known[i].get("module", i)) if known else returned[i][0] for i in places]
    seen.maps = [seen.maps[i] for i in places]
    stages = probing.described(
        seen.maps,
        names,
        _layouts(layout, timm_backbones.layout(backbone), len(places)),
        size,
        channels=[known[i]["num_chs"] for i in places] if known else None,
        reductions=[known[i]["reduction"] for i in places] if known else None,
        tokens=0 if isinstance(backbone, Intermediates) or not drop else timm_backbones.class_tokens(backbone),
    )
    return backbone, ReturnedMaps(places), stages, seen


def _ends_in_pooling(backbone: nn.Module, seen: probing.Seen) -> bool:
    """Whether the last map is what a max-pool gives, as timm's VGG has it: no stage's end, Interflow has no pool5."""
    pools = [name for name, module in backbone.named_modules() if isinstance(module, nn.MaxPool2d)]
    return any(output is seen.maps[-1] for name in pools for output in seen.outputs.get(name, []))


def _hooked(
    backbone: nn.Module, names: list[str], info: list[dict[str, Any]] | None, drop: bool, layout: Any, size: Sequence[int], exchange: Exchange
) -> Opened:
    """A backbone whose submodules `names` give the maps. info: timm's word on each, where there is one."""
    choosing.known(names, [name for name, _ in backbone.named_modules() if name], "submodule")
    reader = HookedMaps(exchange, names)
    reader.install(backbone, None if info is None else [entry.get("hook_type") == "forward_pre" for entry in info])
    seen = probing.run(reader, backbone, size)
    known = torchvision_backbones.family(backbone)
    word = timm_backbones.layout(backbone) if known is None else known.layout
    stages = probing.described(
        seen.maps,
        names,
        _layouts(layout, word, len(names)),
        size,
        channels=None if info is None else [entry["num_chs"] for entry in info],
        reductions=None if info is None else [entry["reduction"] for entry in info],
        tokens=timm_backbones.class_tokens(backbone) if drop else 0,
    )
    return backbone, reader, stages, seen


def _torchvision(backbone: nn.Module, chosen: Any, drop: bool, layout: Any, size: Sequence[int], exchange: Exchange) -> Opened:
    """A model of torchvision: as a graph that ends at its last stage where that can stand for it, else by hooks."""
    names = chosen if chosen and isinstance(chosen[0], str) else torchvision_backbones.stage_names(backbone, chosen, size)
    if names is None:
        raise ValueError(f"stages must name nodes or submodules of torchvision's {type(backbone).__name__}, whose stages are not built in, got {chosen!r}")
    graph = torchvision_backbones.extractor(backbone, names)
    if graph is None:
        return _hooked(backbone, torchvision_backbones.as_submodules(backbone, names), None, drop, layout, size, exchange)
    known = torchvision_backbones.family(backbone)
    order = torchvision_backbones.node_names(graph)
    reader = ReturnedMaps([order.index(name) for name in names])
    seen = probing.run(reader, graph, size)
    stages = probing.described(
        seen.maps,
        names,
        _layouts(layout, "NCHW" if known is None else known.layout, len(names)),
        size,
        tokens=timm_backbones.class_tokens(backbone) if drop else 0,
    )
    return graph, reader, stages, seen


def _layouts(given: Any, word: str, count: int) -> list[str]:
    """The layout of each stage: what was given, else the backbone's word."""
    if given is None:
        return [word] * count
    each = [given] * count if isinstance(given, str) else list(given)
    if len(each) != count:
        raise ValueError(f"layout must be one string or {count}, one for each stage, got {len(each)}")
    return each


class _Weights:
    """Where a backbone that was built by its name gets its pretrained weights: called, it gives their state_dict."""

    def __init__(self, name: str, stages: Any, keep: bool, options: dict[str, Any], size: Sequence[int]) -> None:
        self.name, self.stages, self.keep, self.options, self.size = name, stages, keep, options, size

    def __call__(self) -> dict[str, Any]:
        if not self.name.startswith("torchvision/"):
            return _by_name(self.name, self.stages, self.keep, self.options).state_dict()
        model = _by_name(self.name, self.stages, self.keep, self.options)
        return _opened(model, self.stages, True, not self.keep, None, self.size, Exchange())[0].state_dict()
