"""The end of a stage in a graph of torch.fx: the ReLU whose output is the map, and the addition before it, as one call of MeanReLU."""

import copy
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from interflow_kernels.modules.plain import is_plain

from .exchange import Exchange
from .mean_relu import MeanReLU
from .traced import TracedModule

_RELUS = (F.relu, torch.relu, F.relu_, torch.relu_)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_GRAPHS = ("train_graph", "eval_graph")


class _OneLevel(fx.Tracer):
    """Traces a module's own forward; its submodules stay modules, whatever they are."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@dataclass(frozen=True)
class End:
    """The end of a stage: the node of the ReLU, what goes into it, the node of the addition or None, and whether the ReLU works in place."""

    relu: fx.Node
    u: fx.Node
    residual: fx.Node | None
    addition: fx.Node | None
    inplace: bool

    @property
    def added_in_place(self) -> bool:
        return self.addition is not None and _in_place(self.addition)


def found(root: nn.Module, node: fx.Node | None) -> End | None:
    """The end whose output is this node's; None where it is no ReLU, or one that somebody else depends on in more than its output."""
    if node is None:
        return None
    inplace = _relu_inplace(root, node)
    if inplace is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    u = node.args[0]
    if inplace and set(u.users) != {node}:
        return None  # others read what the ReLU writes over
    if set(u.users) == {node} and _is_addition(u):
        a, b = u.args
        assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
        if not _in_place(u) or set(a.users) == {u}:
            return End(node, a, b, u, inplace)
    return End(node, u, None, None, inplace)


def _relu_inplace(root: nn.Module, node: fx.Node) -> bool | None:
    """Whether a node that is a ReLU works in place; None where it is none."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return bool(module.inplace) if is_plain(module, nn.ReLU) and not node.kwargs and len(node.args) == 1 else None
    if node.op == "call_function" and node.target in _RELUS:
        return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else node.target in (F.relu_, torch.relu_)))
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return node.target == "relu_"
    return None


def _is_addition(node: fx.Node) -> bool:
    named = (node.op == "call_function" and node.target in _ADDITIONS) or (node.op == "call_method" and node.target in ("add", "add_"))
    return named and not node.kwargs and len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)


def _in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def put_in(graph: fx.Graph, end: End, target: str) -> None:
    """Replaces the end by a call of the submodule `target`."""
    with graph.inserting_before(end.relu):
        call = graph.call_module(target, (end.u,) if end.residual is None else (end.u, end.residual))
    end.relu.replace_all_uses_with(call)
    graph.erase_node(end.relu)
    if end.addition is not None:
        graph.erase_node(end.addition)


def block_with_mean(module: nn.Module, exchange: Exchange, stage: int) -> fx.GraphModule | None:
    """A residual block whose addition and ReLU are one call; None unless its forward ends in just these, the same in both modes."""
    traced = [_traced(module, mode) for mode in (True, False)]
    if traced[0] is None or traced[1] is None or str(traced[0]) != str(traced[1]):
        return None
    graph = traced[0]
    returned = next(node for node in graph.nodes if node.op == "output").args[0]
    end = found(module, returned) if isinstance(returned, fx.Node) else None
    if end is None or end.addition is None or set(end.relu.users) != {next(n for n in graph.nodes if n.op == "output")}:
        return None
    before = [name for name, _ in module.named_modules()]
    made = TracedModule(module, graph, type(module).__name__)
    made.add_submodule("stage_end", MeanReLU(exchange, stage, end.inplace, end.added_in_place))
    put_in(made.graph, next_end(made, end), "stage_end")
    made.recompile()
    _keep_order(made, module)
    if list(made.state_dict()) != list(module.state_dict()) or not _holds(made, module, before):
        return None
    made.train(module.training)
    return made


def next_end(made: fx.GraphModule, end: End) -> End:
    """The same end in the graph that a GraphModule has copied."""
    returned = next(node for node in made.graph.nodes if node.op == "output").args[0]
    again = found(made, returned)
    assert again is not None and (again.addition is None) == (end.addition is None)
    return again


def _traced(module: nn.Module, mode: bool) -> fx.Graph | None:
    before = module.training
    module.training = mode
    try:
        return _OneLevel().trace(module)
    except Exception:  # what a forward does with a Proxy in place of a tensor raises anything
        return None
    finally:
        module.training = before


def _keep_order(made: nn.Module, module: nn.Module) -> None:
    """The children in the block's order, and those that its forward does not call, so that state_dict is the same."""
    children = {name: child for name, child in module._modules.items() if name in made._modules or child is None or not any(True for _ in child.parameters())}
    own = {name: child for name, child in made._modules.items() if name not in module._modules}
    made._modules = {**children, **own}


def _holds(made: nn.Module, module: nn.Module, before: Sequence[str]) -> bool:
    """Whether every parameter and buffer of the block is the same tensor in what was made of it."""
    old = dict([*module.named_parameters(), *module.named_buffers()])
    new = dict([*made.named_parameters(), *made.named_buffers()])
    return old.keys() == new.keys() and all(new[name] is tensor for name, tensor in old.items())


@dataclass
class GraphChange:
    """The ends that were replaced in a whole backbone's graphs, to be undone together."""

    said: str
    restore: Any

    def undo(self) -> None:
        self.restore()


def replace_in_backbone(backbone: fx.GraphModule, names: Sequence[str], exchange: Exchange) -> dict[int, GraphChange]:
    """Replaces the ends of the stages in a backbone that is a graph, as torchvision's feature extractor is; stage -> what was done.

    Its output is a mapping from the stages' names to nodes, or a sequence of nodes; where training and evaluation have a graph each, both are changed alike.
    """
    attributes = [name for name in _GRAPHS if isinstance(getattr(backbone, name, None), fx.Graph)] or ["graph"]
    graphs: dict[str, fx.Graph] = {name: getattr(backbone, name) for name in attributes}
    before = {name: copy.deepcopy(graph) for name, graph in graphs.items()}

    def put(chosen: dict[str, fx.Graph]) -> None:
        for name, graph in chosen.items():
            setattr(backbone, name, graph)
        backbone.graph = chosen[attributes[0 if backbone.training else -1]]  # compiles it

    def restore() -> None:
        put(before)
        for i in range(len(names)):
            backbone._modules.pop(_target(i), None)

    changes: dict[int, GraphChange] = {}
    for i, name in enumerate(names):
        ends = [found(backbone, _node(graph, name)) for graph in graphs.values()]
        first = ends[0]
        if first is None or any(end is None or (end.addition is None) != (first.addition is None) for end in ends):
            continue
        said = f"{'ReLU' if first.addition is None else 'addition and ReLU'} at the end of {name}"
        backbone.add_submodule(_target(i), MeanReLU(exchange, i, first.inplace, first.added_in_place).train(backbone.training))
        for graph, end in zip(graphs.values(), ends, strict=True):
            assert end is not None
            put_in(graph, end, _target(i))
        changes[i] = GraphChange(said, restore)
    if changes:
        put(graphs)
    return changes


def _target(stage: int) -> str:
    return f"stage_end_{stage}"


def _node(graph: fx.Graph, name: str) -> fx.Node | None:
    """The node of the map `name` among what a graph returns, a mapping or a sequence; None where it is none."""
    output: Any = next(node for node in graph.nodes if node.op == "output").args[0]
    if isinstance(output, (list, tuple)):
        output = {str(i): node for i, node in enumerate(output)}
    node = output.get(name) if isinstance(output, Mapping) else None
    return node if isinstance(node, fx.Node) else None
