"""The head's contract: operator handles, fakes, autograd, autocast, vmap. Kernels are compiled and register themselves.

    interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, dtype)
        -> y [B, K], branches [B, n, K] or [0], pooled [B, D]
    interflow_head_backward(dy, dbranches, pooled, weight, bias, attention_weight, attention_bias, attention, widths, ...)
        -> dpooled [B, D], dweight [K, D], dbias [n, K], dattention_weight, dattention_bias; [0] where not needed

How differentiation is wired: see _wiring.py. Backward returns pooled gradients; their expansion to a map's size stays outside the operator, so
that Inductor sees it and nothing of that size is written.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._namespace import NAMESPACE
from .._tracing import EAGER, FORWARD_MODE, OPERATOR
from ._autograd_kernels import register_autograd
from ._library import OPERATORS, library
from ._pooling import feature_gradients, pooled_width, remember_features
from ._refusals import one_device
from ._wiring import accumulation_dtype, below_autograd, builds_no_graph, differentiable_once, forward_mode_raises, looped

raw_interflow_head = OPERATORS.interflow_head.default
raw_interflow_head_backward = OPERATORS.interflow_head_backward.default

_REMEDY = "use the head's to_eager(), or backend('eager')"
_NO_DOUBLE_BACKWARD = f"interflow_head: double backward is not implemented; {_REMEDY}"
_NO_FORWARD_MODE = f"interflow_head: forward-mode differentiation (jvp, jacfwd, hessian) is not implemented; {_REMEDY}"


# --- fakes: the shapes, strides and dtypes that the kernels really return ---------------------------------------------
@torch.library.register_fake(f"{NAMESPACE}::interflow_head", lib=library)
def _(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, dtype):  # type: ignore[no-untyped-def]
    one_device("interflow_head", features, weight, bias, attention_weight, attention_bias)
    batch, classes = features[0].shape[0], weight.shape[0]
    width = sum(pooled_width(x, pool_size) for x in features)
    dtype = weight.dtype if dtype is None else dtype
    return (
        weight.new_empty((batch, classes), dtype=dtype),
        weight.new_empty((batch, len(features), classes) if need_branches else (0,), dtype=dtype),
        weight.new_empty((batch, width), dtype=accumulation_dtype(weight)),
    )


@torch.library.register_fake(f"{NAMESPACE}::interflow_head_backward", lib=library)
def _(dy, dbranches, pooled, weight, bias, attention_weight, attention_bias, attention, widths, feature_stages, need_weight, need_bias, need_attention):  # type: ignore[no-untyped-def]
    def like(t: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        if t is None:
            return weight.new_empty((0,), dtype=dtype)
        return weight.new_empty(t.shape if needed else (0,), dtype=t.dtype)

    one_device("interflow_head_backward", dy, dbranches, pooled, weight, bias, attention_weight, attention_bias)
    dtype = accumulation_dtype(weight)
    return (
        weight.new_empty(pooled.shape if len(feature_stages) else (0,), dtype=pooled.dtype),
        like(weight, need_weight, dtype),
        like(bias, need_bias, dtype),
        like(attention_weight, need_attention, dtype),
        like(attention_bias, need_attention, dtype),
    )


# --- what both routes do -------------------------------------------------------------------------------------------------
def _remember(ctx: Any, attention: str, pool_size: Sequence[int], features: Sequence[Tensor], pooled: Tensor, parameters: Sequence[Tensor | None]) -> None:
    """Saves pooled [B, D] and the parameters; of the features, only what their gradients' shape and layout need."""
    ctx.set_materialize_grads(False)
    ctx.attention = attention
    remember_features(ctx, pool_size, features)
    ctx.save_for_backward(pooled, *parameters)


def _note_needs(ctx: Any, parameters: Sequence[bool], features: Sequence[bool]) -> None:
    """Which gradients are wanted: of (weight, bias, attention_weight, attention_bias) and of each feature."""
    ctx.need_weight, ctx.need_bias = parameters[0], parameters[1]
    ctx.need_attention = parameters[2] or parameters[3]
    ctx.feature_stages = [i for i, needed in enumerate(features) if needed]


def _gradients(ctx: Any, run: Callable[..., Any], dy: Tensor | None, dbranches: Tensor | None) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Gradients of (weight, bias, attention_weight, attention_bias) and of the features; None where not needed."""
    pooled, weight, bias, attention_weight, attention_bias = ctx.saved_tensors
    dp, dw, db, daw, dab = run(
        dy,
        dbranches,
        pooled,
        weight,
        bias,
        attention_weight,
        attention_bias,
        ctx.attention,
        ctx.widths,
        ctx.feature_stages,
        ctx.need_weight,
        ctx.need_bias,
        ctx.need_attention,
    )
    parameters = [
        dw if ctx.need_weight else None,
        db if ctx.need_bias and bias is not None else None,
        daw if ctx.need_attention and attention_weight is not None else None,
        dab if ctx.need_attention and attention_bias is not None else None,
    ]
    return parameters, feature_gradients(ctx, dp)


# --- (a) the raw operator differentiates ---------------------------------------------------------------------------------
def _raw_setup(ctx: Any, inputs: Any, output: Any) -> None:
    features, *parameters, attention, pool_size, need_branches, _dtype = inputs
    ctx.need_branches = need_branches
    _note_needs(ctx, [t is not None and t.requires_grad for t in parameters], [x.requires_grad for x in features])
    _remember(ctx, attention, pool_size, features, output[2], parameters)


def _raw_backward(ctx: Any, dy: Tensor | None, dbranches: Tensor | None, _dpooled: Tensor | None) -> Any:
    parameters, features = _gradients(ctx, raw_interflow_head_backward, dy, dbranches if ctx.need_branches else None)
    return features, *parameters, None, None, None, None


register_autograd("interflow_head", _raw_backward, _NO_FORWARD_MODE, _raw_setup)


# --- (b) the public function's own Function ---------------------------------------------------------------------------------
_HeadBackward = differentiable_once("interflow_head_backward", lambda: raw_interflow_head_backward, _NO_DOUBLE_BACKWARD, _NO_FORWARD_MODE)


class InterflowHeadFunction(torch.autograd.Function):
    """Arguments: attention, pool_size, need_branches, dtype, weight, bias, attention_weight, attention_bias, *features."""

    @staticmethod
    def forward(attention: str, pool_size: Any, need_branches: bool, dtype: Any, weight: Tensor, bias: Any, aw: Any, ab: Any, *features: Tensor) -> Any:
        return below_autograd(raw_interflow_head, list(features), weight, bias, aw, ab, attention, pool_size, need_branches, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        attention, pool_size, need_branches, _dtype, *tensors = inputs
        _y, branches, pooled = output
        # The gradients of "gated" depend on pooled: left differentiable, it leads a second differentiation to the Function that raises.
        constant = [] if attention == "gated" and not torch.compiler.is_compiling() else [pooled]
        ctx.mark_non_differentiable(*constant, *(() if need_branches else (branches,)))
        ctx.need_branches = need_branches
        _note_needs(ctx, ctx.needs_input_grad[4:8], ctx.needs_input_grad[8:])
        _remember(ctx, attention, pool_size, tensors[4:], pooled, tensors[:4])

    @staticmethod
    def backward(ctx: Any, dy: Any, dbranches: Any, _dpooled: Any) -> Any:
        # Dynamo mishandles a Function with setup_context inside a backward, so it sees the operator itself.
        run = raw_interflow_head_backward if torch.compiler.is_compiling() else _HeadBackward.apply
        parameters, features = _gradients(ctx, run, dy, dbranches if ctx.need_branches else None)
        return None, None, None, None, *parameters, *features

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        if any(d is not None for d in in_dims[4:8]):  # mapped parameters: a head for each slice
            return looped(_call, info.batch_size, in_dims, args)
        # Mapped features only: the mapped dimension joins the batch.
        joined = []
        for x, d in zip(args[8:], in_dims[8:], strict=True):
            x = x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0)
            joined.append(x.flatten(0, 1))
        y, branches, pooled = _call(*args[:8], *joined)
        split = [t.unflatten(0, (info.batch_size, -1)) if t.dim() > 1 else t for t in (y, branches, pooled)]
        return tuple(split), (0, 0 if args[2] else None, 0)


_head = forward_mode_raises(InterflowHeadFunction, _NO_FORWARD_MODE)


def _call(attention: str, pool_size: Any, need_branches: bool, dtype: Any, weight: Tensor, bias: Any, aw: Any, ab: Any, *features: Tensor) -> Any:
    """y, branches, pooled: by the Function, or by the operator alone where no graph is built.

    Under torch.compile too: where no graph is built Dynamo inlines the Function's forward, and passes its ctx to one with *features.
    """
    if not torch._C._are_functorch_transforms_active() and builds_no_graph((weight, bias, aw, ab, *features)):
        return below_autograd(raw_interflow_head, list(features), weight, bias, aw, ab, attention, pool_size, need_branches, dtype)
    return _head().apply(attention, pool_size, need_branches, dtype, weight, bias, aw, ab, *features)


def interflow_head(
    features: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: tuple[int, int],
    need_branches: bool,
    route: str = EAGER,
) -> tuple[Tensor, Tensor | None]:
    """features n of [B, C_i, H_i, W_i] or [B, D_i], checked -> y [B, K], Z [B, n, K] or None. Autocast is settled here.

    route: who records the call, by _tracing.route(); not PLAIN.
    """
    dtype = reference.autocast_dtype(weight)
    if route == FORWARD_MODE:
        raise NotImplementedError(_NO_FORWARD_MODE)
    if route == OPERATOR or (
        route == EAGER and torch.is_inference_mode_enabled() and not torch._C._are_functorch_transforms_active()
    ):  # the shortest route, for serving
        y, branches, _ = raw_interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, dtype)
    else:
        y, branches, _ = _call(attention, pool_size, need_branches, dtype, weight, bias, attention_weight, attention_bias, *features)
    return y, branches if need_branches else None


# --- (c) autocast of raw calls: y in the autocast dtype; parameters and maps are read as they are -----------------------------
def _raw_autocast(device: str, key: str) -> Callable[..., Any]:
    excluded = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(features, weight, bias, aw, ab, attention, pool_size, need_branches, dtype):  # type: ignore[no-untyped-def]
        if dtype is None and weight.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            return raw_interflow_head(features, weight, bias, aw, ab, attention, pool_size, need_branches, dtype)

    return kernel


for _device, _key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA"), ("xpu", "AutocastXPU")):
    library.impl("interflow_head", _raw_autocast(_device, _key), _key)
