"""What torch.fx.symbolic_trace meets: our functions and modules are leaves of its graph, one node each, as PyTorch's own layers are."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.fx import Proxy


def _proxy_in(value: Any) -> Proxy | None:
    """The first Proxy in arguments, lists and mappings of them."""
    if isinstance(value, Proxy):
        return value
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (list, tuple)):
        return next((found for found in map(_proxy_in, value) if found is not None), None)
    return None


def leaf(target: Any, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
    """The node for a call of `target`, a function, or of a method of a module, on arguments that hold a Proxy.

    Called while an error is handled: where no argument is a Proxy, that error is raised again.
    """
    proxy = _proxy_in((*args, *kwargs.values()))
    if proxy is None:
        raise
    tracer = proxy.tracer
    if not isinstance(target, nn.Module):
        return tracer.create_proxy("call_function", target, args, kwargs)
    path = tracer.path_of_module(target) if hasattr(tracer, "path_of_module") else ""
    if not path:  # traced by itself: no graph can hold it
        raise TypeError(f"torch.fx cannot trace into {type(target).__name__}, which is one operator; trace the network that holds it") from None
    if method == "forward":
        return tracer.create_proxy("call_module", path, args, kwargs)
    return tracer.create_proxy("call_method", method, (tracer.create_proxy("get_attr", path, (), {}), *args), kwargs)
