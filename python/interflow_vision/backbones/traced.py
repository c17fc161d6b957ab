"""TracedModule: what torch.fx makes of a module, with the hooks that people register on it afterwards kept in copies and pickles."""

import copy
from collections.abc import Callable
from typing import Any

from torch import fx

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class TracedModule(fx.GraphModule):
    """A GraphModule whose copies and pickles have its hooks; PyTorch's own (2.13) lose them in silence."""

    def __deepcopy__(self, memo: Any) -> "TracedModule":
        made: Any = super().__deepcopy__(memo)
        vars(made).update({name: copy.deepcopy(vars(self)[name], memo) for name in _HOOKS})
        return made

    def __reduce__(self) -> Any:
        remake, arguments = super().__reduce__()[:2]
        return _with_hooks, (remake, arguments, {name: vars(self)[name] for name in _HOOKS})


def _with_hooks(remake: Callable[..., fx.GraphModule], arguments: tuple[Any, ...], hooks: dict[str, Any]) -> TracedModule:
    plain = remake(*arguments)
    made = TracedModule(plain, plain.graph, type(plain).__name__)
    made.train(plain.training)
    vars(made).update(hooks)
    return made
