"""What every operator's differentiation shares.

It has two routes: the raw operators have `register_autograd` (opcheck, callers of torch.ops); the public function has its own
autograd.Function, the only arrangement in which torch.func, fullgraph compilation, stride-0 gradients and autocast all hold.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._autograd_kernels import register_autograd


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """What sums are kept in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def builds_no_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing could ask for a derivative, in reverse or forward mode."""
    if forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors)


def below_autograd(operator: Any, *arguments: Any) -> Any:
    """Calls an operator where no graph is to be built: past its registered autograd, whose Python costs more than a small head."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def looped(call: Callable[..., Any], batch_size: int, in_dims: Any, args: Any) -> Any:
    """One call for each slice of the mapped dimension, results stacked in front."""
    slices = [[a.select(d, v) if isinstance(a, Tensor) and d is not None else a for a, d in zip(args, in_dims, strict=True)] for v in range(batch_size)]
    results = [call(*each) for each in slices]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _raising(sentence: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> Any:
        raise NotImplementedError(sentence)

    return refuse


def forward_mode_raises(function: Any, sentence: str) -> Callable[[], Any]:
    """Chooses at each call: `function`, or, where forward-mode differentiation is under way, the same with a jvp that raises.

    Two classes, since Dynamo takes no Function that has a jvp. PyTorch calls it only where an input has a tangent.
    """
    refusing = type(function.__name__, (function,), {"jvp": staticmethod(_raising(sentence)), "__module__": function.__module__})
    return lambda: refusing if forward_ad._current_level >= 0 else function


def differentiable_once(name: str, operator: Callable[[], Any], twice: str, forward_mode: str) -> Any:
    """The Function by which the public route calls the backward operator `name`: a second differentiation raises, by whichever route it comes.

    operator: gives what is called in place of the operator, looked up at each call.
    twice, forward_mode: the sentences for a second differentiation, and for one in forward mode.
    """
    refuse = _raising(twice)

    register_autograd(name, refuse, forward_mode)

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            return below_autograd(operator(), *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return refuse()

        jvp = staticmethod(_raising(forward_mode))

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            return looped(named.apply, info.batch_size, in_dims, args)

    # A class of its own for each operator: its name is what profilers and grad_fn show.
    named: Any = type(f"{''.join(word.capitalize() for word in name.split('_'))}Function", (Backward,), {"__module__": Backward.__module__})
    return named
