"""Parameters that are computed from others: parametrizations, and the hooks of weight_norm, spectral_norm and pruning.

What needs care is the same for all of them: a module of another class with the same tensors, and a look at a weight that
changes nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Forward pre-hooks that compute a parameter from others and do nothing else."""
_HOOKS = ("_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_Kind = TypeVar("_Kind", bound=nn.Module)


def twin(module: nn.Module, kind: type[_Kind]) -> _Kind:
    """A module of class `kind` with the state of `module`: dictionaries and submodules of its own, the same tensors.

    Parametrizations go along, and so do the hooks that compute parameters (weight_norm, spectral_norm, pruning). Other
    forward and backward hooks stay with the module that they were registered on.
    """
    made = kind
    if parametrize.is_parametrized(module):  # the properties lie in a class that was made for it
        own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__", "__doc__", "__module__")}
        made = type(f"Parametrized{kind.__name__}", (kind,), own)
    other = _copied(module, made)
    for name in _HOOKS:
        vars(other)[name] = type(vars(other)[name])()
    kept = {number: hook for number, hook in other._forward_pre_hooks.items() if isinstance(hook, COMPUTING)}
    other._forward_pre_hooks.clear()
    other._forward_pre_hooks.update(kept)
    other._forward_pre_hooks_with_kwargs.clear()
    return other


def _copied(module: nn.Module, kind: type[_Kind]) -> _Kind:
    other = kind.__new__(kind)
    vars(other).update({name: value.copy() if isinstance(value, (dict, set)) else value for name, value in vars(module).items()})
    vars(other).pop("_compiled_call_impl", None)  # of module.compile(): it calls `module`
    for name, child in other._modules.items():
        if child is not None:
            other._modules[name] = _copied(child, type(child))
    return other


def recompute(module: nn.Module) -> None:
    """What a call of the module does before its forward: the weights that hooks compute."""
    for hook in tuple(module._forward_pre_hooks.values()):
        if isinstance(hook, COMPUTING):
            hook(module, ())


@contextmanager
def only_read(module: nn.Module) -> Iterator[None]:
    """Inside it, computed weights are up to date and read as in eval mode: no power iteration, no buffer changes. Leaves the module as it was."""
    parts = list(module.modules())  # a norm and parametrizations are submodules
    training = [part.training for part in parts]
    tensors = {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}  # where hooks put what they compute
    try:
        for part in parts:
            part.training = False
        recompute(module)
        yield
    finally:
        vars(module).update(tensors)
        for part, before in zip(parts, training, strict=True):
            part.training = before
