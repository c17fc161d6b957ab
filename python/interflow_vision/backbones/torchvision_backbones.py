"""Backbones of torchvision: where the stages of each family end, and the feature extractor that torch.fx makes of a model."""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from interflow_kernels.modules.plain import altered

from ..errors import require
from .choosing import default_places, nearest, places
from .probing import image, undisturbed
from .traced import TracedModule


@dataclass(frozen=True)
class Family:
    """names: where the stages end, in order of depth; a single name with a star stands for the children of that container.

    Of the children of a container those are stages' ends behind which the map's size changes, and the last (but for a pooling
    after it: Interflow has no pool5); of blocks that give tokens every one.
    """

    names: tuple[str, ...]
    layout: str = "NCHW"


FAMILIES = {
    "AlexNet": Family(("features.*",)),
    "ConvNeXt": Family(("features.1", "features.3", "features.5", "features.7")),
    "DenseNet": Family(("features.denseblock1", "features.denseblock2", "features.denseblock3", "relu")),
    "EfficientNet": Family(("features.*",)),
    "GoogLeNet": Family(("conv3", "inception3b", "inception4e", "inception5b")),
    "Inception3": Family(("Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c")),
    "MaxVit": Family(("blocks.0", "blocks.1", "blocks.2", "blocks.3")),
    "MNASNet": Family(("layers.*",)),
    "MobileNetV2": Family(("features.*",)),
    "MobileNetV3": Family(("features.*",)),
    "RegNet": Family(("trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output.block4")),
    "ResNet": Family(("layer1", "layer2", "layer3", "layer4")),
    "ShuffleNetV2": Family(("conv1", "stage2", "stage3", "conv5")),
    "SqueezeNet": Family(("features.*",)),
    "SwinTransformer": Family(("features.1", "features.3", "features.5", "features.7"), "NHWC"),
    "VGG": Family(("features.*",)),
    "VisionTransformer": Family(("encoder.layers.*",), "NLC"),
}
"""By the name of torchvision's class."""

_POOLING = (nn.MaxPool2d, nn.AvgPool2d)

_NOT_NEEDED = {"DenseNet": {"relu": "features"}}
"""Nodes that are no submodule -> the submodule whose output they write over."""


def family(model: nn.Module) -> Family | None:
    """What is built in about a model of torchvision's; None for any other."""
    return FAMILIES.get(type(model).__name__) if type(model).__module__.startswith("torchvision.") else None


def build(name: str, options: dict[str, Any]) -> nn.Module:
    """torchvision's model `name`; options are those of torchvision.models.get_model, `pretrained` stands for weights="DEFAULT"."""
    models = require("torchvision", f"backbone {name!r}", "backbones").models
    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(f"backbone: torchvision has no model {name!r}{nearest(name, known)}")
    chosen = dict(options)
    if chosen.pop("pretrained", False):
        chosen["weights"] = "DEFAULT"
    if name in ("googlenet", "inception_v3"):
        chosen.setdefault("init_weights", False)  # else it warns that this takes minutes
    return models.get_model(name, **chosen)  # type: ignore[no-any-return, unused-ignore]


def stage_names(model: nn.Module, stages: list[int] | None, size: Sequence[int]) -> list[str] | None:
    """The names of the chosen stages of a model whose family is built in, else None."""
    known = family(model)
    if known is None:
        return None
    names = list(known.names)
    if len(names) == 1:
        container = names[0].removesuffix(".*")
        blocks = [f"{container}.{name}" for name, _ in model.get_submodule(container).named_children()]
        names = blocks if known.layout == "NLC" else _ends_below(model, container, size)
    taken = default_places(len(names)) if stages is None else places(stages, len(names))
    return [names[i] for i in taken]


def _ends_below(model: nn.Module, container: str, size: Sequence[int]) -> list[str]:
    """The children of a container, which takes the image, behind which the map's size changes, and the last but for pooling."""
    shapes: list[tuple[str, torch.Size]] = []
    with undisturbed(model):
        x = image(model, size)
        for name, child in model.get_submodule(container).named_children():
            x = child(x)
            shapes.append((f"{container}.{name}", x.shape))
    if isinstance(child, _POOLING):
        shapes.pop()
    return [name for i, (name, shape) in enumerate(shapes) if i + 1 == len(shapes) or shapes[i + 1][1][2:] != shape[2:]]


def extractor(model: nn.Module, names: Sequence[str]) -> fx.GraphModule | None:
    """torchvision's feature extractor: the part of the model that leads to the nodes `names`, as a graph that returns their maps by name.

    None where a graph cannot stand for the model: hooks, wrappers or a forward of its own on a module that it would flatten,
    or code that torch.fx cannot trace. ValueError for a name that is no node.
    """
    from torchvision.models import feature_extraction

    if any(altered(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn")):
        return None
    with warnings.catch_warnings(), _modes_kept(model):
        warnings.simplefilter("ignore")
        try:
            made = feature_extraction.create_feature_extractor(model, {name: name for name in names}, suppress_diff_warning=True)
            return _one_graph(made)
        except ValueError as error:
            if "is not present in model" not in str(error):
                return None
            nodes = feature_extraction.get_graph_node_names(model, suppress_diff_warning=True)[1]
        except Exception:  # torch.fx raises by what it meets: TraceError, TypeError, AttributeError, ...
            return None
    valid = sorted({".".join(node.split(".")[:n]) for node in nodes for n in range(1, node.count(".") + 2)})
    wrong = next((name for name in names if name not in valid), names[0])
    raise ValueError(f"stages: the backbone has no node {wrong!r}{nearest(wrong, valid)}")


def _one_graph(made: Any) -> fx.GraphModule:
    """A plain GraphModule where training and evaluation run the same code: torchvision's loses its second graph in a pickle, its mode in a copy."""
    codes = [graph.python_code("self").src for graph in (made.train_graph, made.eval_graph)]
    return TracedModule(made, made.eval_graph, type(made).__name__) if codes[0] == codes[1] else made


def node_names(graph: Any) -> list[str]:
    """The names of the maps that an extractor returns, in its order."""
    return list(next(node for node in graph.graph.nodes if node.op == "output").args[0])


def as_submodules(model: nn.Module, names: Sequence[str]) -> list[str]:
    """The names with submodules in place of nodes that are none; for hooks, where no graph can be made."""
    other = _NOT_NEEDED.get(type(model).__name__, {})
    return [other.get(name, name) for name in names]


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Any:
    """Tracing switches modes: afterwards each module has its own again, whatever was raised."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
