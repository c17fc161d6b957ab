"""Backbones of timm: built by name as feature extractors, or given as a model that classifies; their layouts and class tokens."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import one_line, require
from .choosing import default_places, nearest, places
from .readers import Intermediates
from .stage import layout_name


def timm() -> Any:
    """The package; MissingPackageError where it is missing."""
    return require("timm", "a backbone by its name", "backbones")


def build(name: str, stages: list[int] | None, keep: bool, options: Mapping[str, Any]) -> nn.Module:
    """timm's model `name` as a module that returns a list of maps; `options` are those of timm.create_model.

    ValueError for a name that timm does not have, or one without feature maps.
    """
    package = timm()
    base = name.split(":", 1)[-1].split(".")[0].removeprefix("timm/")
    if ":" not in name and not package.is_model(base):
        raise ValueError(f"backbone: timm has no model {name!r}{nearest(name, package.list_models())}")
    chosen = {} if stages is None else {"out_indices": tuple(stages)}
    try:
        net = package.create_model(name, features_only=True, **chosen, **options)
    except (AssertionError, IndexError) as error:
        if stages is None:
            raise ValueError(f"backbone: timm's {name} gives no feature maps ({one_line(error) or type(error).__name__})") from error
        count = len(package.create_model(name, features_only=True, **options).feature_info.info)
        raise ValueError(f"stages must be indices from {-count} to {count - 1} of the {count} maps of timm's {name}, got {stages}") from error
    except RuntimeError as error:
        if "features_only" in str(error) or "feature" in str(error).lower():
            raise ValueError(f"backbone: timm's {name} gives no feature maps ({one_line(error)})") from error
        raise
    return with_tokens(net, stages, keep)


def with_tokens(net: Any, stages: list[int] | None, keep: bool) -> nn.Module:
    """timm's FeatureGetterNet of a transformer without the copies that make maps of its tokens; any other extractor as it is."""
    model = getattr(net, "model", None)
    if type(net).__name__ != "FeatureGetterNet" or not isinstance(model, nn.Module):
        return net
    count = len(net.feature_info.info)
    taken = default_places(count, [entry["reduction"] for entry in net.feature_info.info]) if stages is None else places(stages, count)
    layout = "NLC" if _gives_tokens(model) else "NCHW"
    made: Any = Intermediates(model, taken, layout, keep and layout == "NLC" and _prefix_option(model))
    made.feature_info = net.feature_info.from_other(taken)
    made.default_cfg = getattr(net, "default_cfg", {})
    return made


def _gives_tokens(model: Any) -> bool:
    """Whether forward_intermediates takes output_fmt="NLC"; its first statement refuses what it does not take."""
    try:
        source = inspect.getsource(type(model).forward_intermediates)
    except (OSError, TypeError, AttributeError):
        return False
    return "'NLC'" in source


def _prefix_option(model: Any) -> bool:
    return "return_prefix_tokens" in inspect.signature(model.forward_intermediates).parameters


def class_tokens(backbone: nn.Module) -> int:
    """How many class and register tokens stand in front of the patches': timm's num_prefix_tokens, torchvision's class_token."""
    model = getattr(backbone, "model", backbone)
    if isinstance(backbone, Intermediates):
        return int(getattr(model, "num_prefix_tokens", 0)) if backbone.keep else 0
    count = getattr(model, "num_prefix_tokens", None)
    if isinstance(count, int):
        return count
    return sum(hasattr(model, name) for name in ("class_token", "cls_token", "dist_token"))


def entries(backbone: nn.Module) -> list[dict[str, Any]] | None:
    """feature_info of the maps that the backbone gives, in their order; None where it has none."""
    info = getattr(backbone, "feature_info", None)
    if info is None:
        return None
    if hasattr(info, "get_dicts") and hasattr(info, "out_indices"):
        return list(info.get_dicts())
    if isinstance(info, (list, tuple)) and all(isinstance(entry, Mapping) and "num_chs" in entry for entry in info):
        return [dict(entry) for entry in info]
    return None


def submodules(backbone: nn.Module) -> list[dict[str, Any]] | None:
    """feature_info of a timm model that classifies, where each entry names a submodule of it; None for anything else."""
    info = entries(backbone)
    if not info or not all(isinstance(entry.get("module"), str) for entry in info):
        return None
    names = dict(backbone.named_modules())
    return info if all(entry["module"] in names for entry in info) else None


def layout(backbone: nn.Module) -> str:
    """The layout of a backbone's maps by its own word, `output_fmt`; NCHW where it has none, as for EfficientNet and HRNet."""
    return layout_name(getattr(backbone, "output_fmt", None))
