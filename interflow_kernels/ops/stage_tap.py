"""The stage tap's contract: operator handles, fakes, autograd, vmap. Kernels are compiled and register themselves.

    stage_tap(u, shift, max_pool, need_mask) -> m [B, C, H/2, W/2] or [0], p [B, C], mask [bytes] or [0]
    stage_tap_backward(dm, dp, mask, like, max_pool, channels_last, need_shift) -> du [B, C, H, W], dshift [C] or [0]

Of the forward pass only the mask is saved. `like` carries u's shape (which may be dynamic) and dtype to backward: a view of one
element. Autocast needs nothing: u comes in whatever dtype the convolution gave it, and shift may stay fp32. How
differentiation is wired: see _wiring.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._namespace import NAMESPACE
from .._tap_format import is_channels_last, mask_bytes, new_map, runs_along_channels
from .._tracing import EAGER, FORWARD_MODE, OPERATOR
from ._autograd_kernels import register_autograd
from ._library import OPERATORS, library
from ._refusals import one_device
from ._wiring import accumulation_dtype, below_autograd, builds_no_graph, differentiable_once, forward_mode_raises, looped

raw_stage_tap = OPERATORS.stage_tap.default
raw_stage_tap_backward = OPERATORS.stage_tap_backward.default

_REMEDY = "use backend('eager')"
_NO_DOUBLE_BACKWARD = f"stage_tap: double backward is not implemented; {_REMEDY}"
_NO_FORWARD_MODE = f"stage_tap: forward-mode differentiation (jvp, jacfwd, hessian) is not implemented; {_REMEDY}"


# --- fakes: the shapes, strides and dtypes that the kernels really return ---------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::stage_tap", lib=library)
def _(u, shift, max_pool, need_mask):  # type: ignore[no-untyped-def]
    one_device("stage_tap", u, shift)
    channels_last = is_channels_last(u)
    return (
        new_map(u, (*u.shape[:2], u.shape[2] // 2, u.shape[3] // 2), u.dtype, channels_last) if max_pool else u.new_empty((0,)),
        u.new_empty(u.shape[:2], dtype=accumulation_dtype(u)),
        u.new_empty((mask_bytes(u.shape, max_pool, channels_last) if need_mask else 0,), dtype=torch.uint8),
    )


@torch.library.register_fake(f"{NAMESPACE}::stage_tap_backward", lib=library)
def _(dm, dp, mask, like, max_pool, channels_last, need_shift):  # type: ignore[no-untyped-def]
    one_device("stage_tap_backward", dm, dp, mask, like)
    du = new_map(like, like.shape, like.dtype, channels_last)
    return du, like.new_empty((like.shape[1] if need_shift else 0,), dtype=accumulation_dtype(like))


# --- what both routes do -------------------------------------------------------------------------------------------------
def _remember(ctx: Any, u: Tensor, shift: Tensor | None, max_pool: bool, mask: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.shape, ctx.dtype, ctx.max_pool, ctx.channels_last = u.shape, u.dtype, max_pool, is_channels_last(u)
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(mask)


def _gradients(ctx: Any, run: Callable[..., Any], dm: Tensor | None, dp: Tensor | None, need_shift: bool) -> tuple[Tensor | None, Tensor | None]:
    """du and dshift in its parameter's dtype; None where nothing flows or nothing is needed."""
    if dm is None and dp is None:
        return None, None
    (mask,) = ctx.saved_tensors
    like = torch.empty((), dtype=ctx.dtype, device=mask.device).expand(ctx.shape)
    if torch.is_grad_enabled() and not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
        like.requires_grad_()  # a second differentiation is met by the sentence also where dm and dp are constants
    du, dshift = run(dm, dp, mask, like, ctx.max_pool, ctx.channels_last, need_shift)
    return du, dshift.to(ctx.shift_dtype) if need_shift else None


# --- (a) the raw operator differentiates ---------------------------------------------------------------------------------
def _raw_setup(ctx: Any, inputs: Any, output: Any) -> None:
    u, shift, max_pool, need_mask = inputs
    ctx.need_mask = need_mask
    ctx.need_shift = shift is not None and shift.requires_grad
    _remember(ctx, u, shift, max_pool, output[2])


def _raw_backward(ctx: Any, dm: Tensor | None, dp: Tensor | None, _dmask: Tensor | None) -> Any:
    if not ctx.need_mask:
        raise RuntimeError("stage_tap: was called with need_mask=False, so nothing was kept for backward; call it with need_mask=True")
    return *_gradients(ctx, raw_stage_tap_backward, dm if ctx.max_pool else None, dp, ctx.need_shift), None, None


register_autograd("stage_tap", _raw_backward, _NO_FORWARD_MODE, _raw_setup)


# --- (b) the public function's own Function ---------------------------------------------------------------------------------
_TapBackward = differentiable_once("stage_tap_backward", lambda: raw_stage_tap_backward, _NO_DOUBLE_BACKWARD, _NO_FORWARD_MODE)


class StageTapFunction(torch.autograd.Function):
    """Arguments: max_pool, u, shift. Always with a mask."""

    @staticmethod
    def forward(max_pool: bool, u: Tensor, shift: Tensor | None) -> Any:
        return below_autograd(raw_stage_tap, u, shift, max_pool, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        max_pool, u, shift = inputs
        m, _p, mask = output
        ctx.mark_non_differentiable(*((mask,) if max_pool else (mask, m)))
        ctx.need_shift = ctx.needs_input_grad[2]
        _remember(ctx, u, shift, max_pool, mask)

    @staticmethod
    def backward(ctx: Any, dm: Any, dp: Any, _dmask: Any) -> Any:
        # Dynamo mishandles a Function with setup_context inside a backward, so it sees the operator itself.
        run = raw_stage_tap_backward if torch.compiler.is_compiling() else _TapBackward.apply
        return None, *_gradients(ctx, run, dm if ctx.max_pool else None, dp, ctx.need_shift)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        max_pool, u, shift = args
        if in_dims[2] is not None:  # a mapped shift: a tap for each slice
            return looped(_tap().apply, info.batch_size, in_dims, args)
        slices = u.movedim(in_dims[1], 0)
        together = slices.flatten(0, 1)
        if is_channels_last(together) != runs_along_channels(slices.shape[1:], slices.stride()[1:]):  # copied: its mask would not be the slices'
            return looped(_tap().apply, info.batch_size, in_dims, args)
        m, p, mask = _tap().apply(max_pool, together, shift)
        split = [t.unflatten(0, (info.batch_size, t.shape[0] // info.batch_size)) for t in ((m, p, mask) if max_pool else (p, mask))]
        return (*split,) if max_pool else (m, *split), (0 if max_pool else None, 0, 0)


_tap = forward_mode_raises(StageTapFunction, _NO_FORWARD_MODE)


def stage_tap(u: Tensor, shift: Tensor | None, max_pool: bool, route: str = EAGER) -> tuple[Tensor | None, Tensor]:
    """u [B, C, H, W], shift [C], checked -> m [B, C, H/2, W/2] or None, p [B, C]. No mask is written where no graph is built.

    route: who records the call, by _tracing.route(); not PLAIN. A recorded program keeps its mask: it may be differentiated later.
    """
    if route == FORWARD_MODE:
        raise NotImplementedError(_NO_FORWARD_MODE)
    if route == OPERATOR:
        m, p, _ = raw_stage_tap(u, shift, max_pool, True)
    elif builds_no_graph((u, shift)) and not torch._C._are_functorch_transforms_active():
        m, p, _ = below_autograd(raw_stage_tap, u, shift, max_pool, False)
    else:
        m, p, _ = _tap().apply(max_pool, u, shift)
    return m if max_pool else None, p
