"""Whether a module is still what its class says: nothing hooked, wrapped, patched, sharded or put in its place since."""

from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules import module as _module

_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)}
_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)  # the last two stand for plain ones while torch.export traces


def plain_tensor(tensor: Any) -> bool:
    """Whether it is a plain tensor or parameter: no DTensor, no quantised or other subclass, not None."""
    return type(tensor) in _TENSORS


def altered(module: nn.Module, but: tuple[type, ...] = ()) -> bool:
    """Whether this one module has hooks, a forward of its own (as accelerate gives it), or was compiled in place. but: pre-hooks that do not count."""
    return bool(
        module._forward_hooks
        or (module._forward_pre_hooks and not all(isinstance(hook, but) for hook in module._forward_pre_hooks.values()))
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` runs `kind.forward` and nothing else: then, and only then, a caller may do its work in another way.

    A subclass is not plain, and so neither is what parametrizations and FSDP make of a module, nor any wrapper. Hooks on
    all modules (torch.nn.modules.module.register_module_forward_hook and its like) count as hooks of this one.
    """
    return (
        type(module) is kind
        and not altered(module)
        and not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
        and not (_module._global_backward_hooks or _module._global_backward_pre_hooks)
        and (kind not in _FORWARDS or kind.forward is _FORWARDS[kind])
    )
