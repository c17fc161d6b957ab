"""The stage end's contract: operator handles, fakes, autograd, vmap. Kernels are compiled and register themselves.

    stage_end(u, shift, residual, activation) -> v [B, C, H, W], p [B, C]
    stage_end_backward(dv, dp, v, like, channels_last, need_shift) -> du [B, C, H, W], dshift [C] or [0]

Of the forward pass v is saved, which the network keeps anyway; without an activation nothing is. `like` carries u's shape (which may
be dynamic) and dtype to backward: v, or a view of one element. The residual's gradient is du itself. Autocast needs nothing: u
comes in whatever dtype the network gave it, and shift may stay fp32. How differentiation is wired: see _wiring.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._namespace import NAMESPACE
from .._tap_format import is_channels_last, new_map, runs_along_channels
from .._tracing import EAGER, FORWARD_MODE, OPERATOR
from ._autograd_kernels import register_autograd
from ._library import OPERATORS, library
from ._refusals import one_device
from ._wiring import accumulation_dtype, below_autograd, builds_no_graph, differentiable_once, forward_mode_raises, looped

raw_stage_end = OPERATORS.stage_end.default
raw_stage_end_backward = OPERATORS.stage_end_backward.default

_REMEDY = "use backend('eager')"
_NO_DOUBLE_BACKWARD = f"stage_end: double backward is not implemented; {_REMEDY}"
_NO_FORWARD_MODE = f"stage_end: forward-mode differentiation (jvp, jacfwd, hessian) is not implemented; {_REMEDY}"


# --- fakes: the shapes, strides and dtypes that the kernels really return ---------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::stage_end", lib=library)
def _(u, shift, residual, activation):  # type: ignore[no-untyped-def]
    one_device("stage_end", u, shift, residual)
    return new_map(u, u.shape, u.dtype, is_channels_last(u)), u.new_empty(u.shape[:2], dtype=accumulation_dtype(u))


@torch.library.register_fake(f"{NAMESPACE}::stage_end_backward", lib=library)
def _(dv, dp, v, like, channels_last, need_shift):  # type: ignore[no-untyped-def]
    one_device("stage_end_backward", dv, dp, v, like)
    du = new_map(like, like.shape, like.dtype, channels_last)
    return du, like.new_empty((like.shape[1] if need_shift else 0,), dtype=accumulation_dtype(like))


# --- what both routes do -------------------------------------------------------------------------------------------------
def _remember(ctx: Any, u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str, v: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype, ctx.device, ctx.channels_last = u.shape, u.dtype, u.device, is_channels_last(u)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.has_residual, ctx.activation = residual is not None, activation
    ctx.save_for_backward(*((v,) if activation == "relu" else ()))


def _gradients(ctx: Any, run: Callable[..., Any], dv: Tensor | None, dp: Tensor | None, need_shift: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """du, dshift in its parameter's dtype, and the residual's gradient; None where nothing flows or nothing is needed."""
    if dv is None and dp is None:
        return None, None, None
    if ctx.activation == "relu":
        (v,) = ctx.saved_tensors
        like = v
    else:
        v, like = None, torch.empty((), dtype=ctx.dtype, device=ctx.device).expand(ctx.shape)  # du does not depend on u: of constants it is one
    du, dshift = run(dv, dp, v, like, ctx.channels_last, need_shift)
    return du, dshift.to(ctx.shift_dtype) if need_shift else None, du if ctx.has_residual else None


# --- (a) the raw operator differentiates ---------------------------------------------------------------------------------
def _raw_setup(ctx: Any, inputs: Any, output: Any) -> None:
    u, shift, residual, activation = inputs
    ctx.need_shift = shift is not None and shift.requires_grad
    _remember(ctx, u, shift, residual, activation, output[0])


def _raw_backward(ctx: Any, dv: Tensor | None, dp: Tensor | None) -> Any:
    return *_gradients(ctx, raw_stage_end_backward, dv, dp, ctx.need_shift), None


register_autograd("stage_end", _raw_backward, _NO_FORWARD_MODE, _raw_setup)


# --- (b) the public function's own Function ---------------------------------------------------------------------------------
_EndBackward = differentiable_once("stage_end_backward", lambda: raw_stage_end_backward, _NO_DOUBLE_BACKWARD, _NO_FORWARD_MODE)


class StageEndFunction(torch.autograd.Function):
    """Arguments: activation, u, shift, residual."""

    @staticmethod
    def forward(activation: str, u: Tensor, shift: Tensor | None, residual: Tensor | None) -> Any:
        return below_autograd(raw_stage_end, u, shift, residual, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        activation, u, shift, residual = inputs
        ctx.need_shift = ctx.needs_input_grad[2]
        _remember(ctx, u, shift, residual, activation, output[0])

    @staticmethod
    def backward(ctx: Any, dv: Any, dp: Any) -> Any:
        # Dynamo mishandles a Function with setup_context inside a backward, so it sees the operator itself.
        run = raw_stage_end_backward if torch.compiler.is_compiling() else _EndBackward.apply
        return None, *_gradients(ctx, run, dv, dp, ctx.need_shift)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        activation, u, shift, residual = args
        _, of_u, of_shift, of_residual = in_dims
        if of_u is None or of_shift is not None or (residual is not None and of_residual is None):  # what differs is no longer batch alone
            return looped(_end().apply, info.batch_size, in_dims, args)
        slices = u.movedim(of_u, 0)
        together = slices.flatten(0, 1)
        if is_channels_last(together) != runs_along_channels(slices.shape[1:], slices.stride()[1:]):  # copied: sums would run in another order
            return looped(_end().apply, info.batch_size, in_dims, args)
        added = None if residual is None else residual.movedim(of_residual, 0).flatten(0, 1)
        outputs = _end().apply(activation, together, shift, added)
        return tuple(t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in outputs), (0, 0)


_end = forward_mode_raises(StageEndFunction, _NO_FORWARD_MODE)


def stage_end(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str, route: str = EAGER) -> tuple[Tensor, Tensor]:
    """u, residual [B, C, H, W] in one dtype, shift [C], checked -> v [B, C, H, W], p [B, C].

    route: who records the call, by _tracing.route(); not PLAIN.
    """
    if route == FORWARD_MODE:
        raise NotImplementedError(_NO_FORWARD_MODE)
    if route == OPERATOR:
        return raw_stage_end(u, shift, residual, activation)
    if builds_no_graph((u, shift, residual)) and not torch._C._are_functorch_transforms_active():
        return below_autograd(raw_stage_end, u, shift, residual, activation)
    return _end().apply(activation, u, shift, residual)
