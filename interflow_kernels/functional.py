"""The documented functions: validate, choose the backend, call."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from . import _backend, _fx, _onnx, _options, _tracing, _validate, reference
from .triton import registration

if registration.schemas_exist():
    from . import ops


def _serves(t: Tensor) -> bool:
    """Whether an operator runs on t, or plain PyTorch does: on request, without kernels for its device, for fp64 on Triton."""
    chosen = _backend.select(t.device.type, t.device.index, t.dtype)
    return chosen == "native" or (chosen == "triton" and t.dtype != torch.float64)


def run_head(
    features: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: tuple[int, int],
    need_branches: bool,
) -> tuple[Tensor, Tensor | None]:
    """The head on checked arguments, features in [B, C, H, W] or [B, D_i] views -> y [B, K], Z [B, n, K] where needed."""
    route = _tracing.route()
    if route == _tracing.ONNX:
        return _onnx.interflow_head(
            features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, reference.autocast_dtype(weight)
        )[:2]
    if not _serves(weight) or route == _tracing.PLAIN:
        return reference.interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size)
    return ops.interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches, route)


def run_pool(features: list[Tensor], pool_size: tuple[int, int]) -> Tensor:
    """The head's first half on checked features -> p [B, D] in fp32, fp64 for fp64 features. Where all are pooled already it is a concatenation."""
    route = _tracing.route()
    if route == _tracing.ONNX:
        return _onnx.interflow_pool(features, pool_size)
    if route == _tracing.PLAIN or not _serves(features[0]) or all(x.dim() == 2 for x in features):
        return reference.interflow_pool(features, pool_size)
    return ops.interflow_pool(features, pool_size, route)


def interflow_head(
    features: Sequence[Tensor] | Mapping[str, Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor,
    attention_bias: Tensor | None = None,
    *,
    attention: str = "nxn",
    pool_size: int | tuple[int, int] = 1,
    layout: str | Sequence[str] = "NCHW",
    return_branches: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Class scores from the feature maps of n stages, in one fused operator.

        p_i = flatten(adaptive_avg_pool2d(x_i, pool_size)),  z_i = p_i W_i^T + b_i,  y = attention(stack(z_i))

    Shapes: features n of [B, C_i, H_i, W_i] (any strides), with layout "NHWC" [B, H_i, W_i, C_i] or tokens [B, N_i, C_i],
    or, already pooled, [B, D_i], D_i = C_i * Sh * Sw, in a list, a tuple or a mapping (its values in order); weight [K, D],
    D = sum D_i; bias [n, K]; attention_weight and attention_bias as the table of InterflowHead says. Returns y [B, K], with
    `return_branches` also Z [B, n, K].

    Dtypes: fp32, fp64, bf16, fp16, one for all; pooled features may be fp32 beside bf16 or fp16. Under autocast each
    feature may have its own and y has the autocast dtype. Sums accumulate in fp32 or wider, long ones so that their error does
    not grow with their length.

    NaN and infinities stand in y and in the branch scores where plain PyTorch has them (`backend("eager")`), 0 * inf included; a
    gradient is finite where PyTorch's is and nowhere else, but NaN and infinity may stand for each other in it. One thing differs:
    a number that is too large only on PyTorch's way there, such as a half-precision branch score or a term of "nxn" that another
    cancels, need not spoil the result, because sums are wider and "nxn" adds M's columns first. The CUDA kernels keep the rule for
    features; an infinite weight or attention weight may give NaN there where PyTorch gives an infinity.

    Differentiable once in features, weight, bias and attention; a second differentiation raises NotImplementedError.
    Raises ValueError or TypeError, naming the argument, what was expected and what came.
    Source: Z. Cai, arXiv 2106.14073.
    """
    mode = _options.attention_mode(attention)
    pool = _options.pair(pool_size, "pool_size")
    return_branches = _options.flag(return_branches, "return_branches")
    if not isinstance(features, (list, tuple)):
        features = _validate.listed(features)
    n = len(features)
    _options.stage_count(n, "features")
    try:
        if not isinstance(weight, Tensor):
            _validate.not_a_tensor(weight, "weight")
        checked = _validate.features(features, weight, n, pool, _options.layouts(layout, n))
    except TypeError:
        options: dict[str, Any] = {"attention": attention, "pool_size": pool_size, "layout": layout, "return_branches": return_branches}
        return _fx.leaf(interflow_head, features, weight, bias, attention_weight, attention_bias, **options)
    bins, width = pool[0] * pool[1], 0
    for x in checked:
        width += x.shape[1] * (bins if x.dim() == 4 else 1)
    _validate.parameters(weight, bias, mode, attention_weight, attention_bias, n, width)
    y, branches = run_head(checked, weight, bias, attention_weight, attention_bias, mode, pool, return_branches)
    if not return_branches:
        return y
    assert branches is not None
    return y, branches


def stage_tap(u: Tensor, shift: Tensor | None = None, *, max_pool: bool = True) -> tuple[Tensor | None, Tensor]:
    """The end of a convolutional stage in one pass: bias, ReLU, 2x2 max-pool, and the mean that a head pools.

        v = relu(u + shift)                    each step rounded to u's dtype; never written to memory
        m = max_pool2d(v, 2, 2)                [B, C, H // 2, W // 2]; None for max_pool=False
        p = mean of v over H, W                [B, C]

    Shapes: u [B, C, H, W], any H, W >= 1 and any strides; shift [C] or None. m has u's dtype; p is fp32 (fp64 for fp64 u)
    and sums in one order, whatever the batch or the thread count. The last row or column of an odd size counts in p, not
    in m; of H or W = 1, m is empty.

    Memory: m and the gradient of u are channels_last where u has C > 1, stride 1 between channels, and strides of C, W, H, B that
    grow in this order (dimensions of size 1 do not count, an image may be repeated with stride 0); else they are contiguous.

    Bits: on every device, m has those of PyTorch's own operators on a CPU, and so has the gradient of u that comes from m or
    from p alone (from both together: in fp32 and fp64). PyTorch itself differs between devices and versions: on CUDA,
    relu(-0.0) is +0 in torch 2.11 and -0 in later ones, and the mean's backward multiplies by 1 / (H * W) where a CPU divides.

    Dtypes: fp32, fp64, bf16, fp16; shift in u's dtype or fp32, rounded to u's. Autocast changes nothing.

    For backward at most one byte a window is kept (one bit an element without max-pool), nothing else; u may be freed. NaN
    and -0 behave as in PyTorch: relu keeps both, the first maximum of a window takes the gradient, with NaN the last NaN.
    Differentiable once in u and shift; a second differentiation raises NotImplementedError.

    Raises ValueError or TypeError, naming the argument, what was expected and what came.
    """
    if isinstance(u, Proxy):
        return _fx.leaf(stage_tap, u, shift, max_pool=max_pool)
    _validate.tap(u, shift)
    max_pool = _options.flag(max_pool, "max_pool")
    route = _tracing.route()
    if not _serves(u) or route in (_tracing.PLAIN, _tracing.ONNX):
        return reference.stage_tap(u, shift, max_pool)
    return ops.stage_tap(u, shift, max_pool, route)


def stage_end(u: Tensor, shift: Tensor | None = None, residual: Tensor | None = None, *, activation: str = "relu") -> tuple[Tensor, Tensor]:
    """The end of a stage whose map the network goes on with, in one pass: bias, shortcut, activation, and the mean that a head pools.

        v = act((u + shift) + residual)        [B, C, H, W]; each step rounded to u's dtype
        p = mean of v over H, W                [B, C]

    act is the ReLU, or nothing for activation="none": then p rides on the pass that adds shift and residual, or on a copy of u.

    Shapes: u [B, C, H, W], any H, W >= 1 and any strides; shift [C] or None; residual [B, C, H, W], any strides, or None. v has u's
    dtype; p is fp32 (fp64 for fp64 u) and sums in one order, whatever the batch or the thread count.

    Memory: v and the gradient of u are channels_last where u has C > 1, stride 1 between channels, and strides of C, W, H, B that
    grow in this order (dimensions of size 1 do not count, an image may be repeated with stride 0); else they are contiguous.

    Bits: on every device, v has those of PyTorch's own operators on a CPU, and so has the gradient of u that comes from v or from p
    alone (from both together: in fp32 and fp64; below, PyTorch rounds each before it adds them). PyTorch itself differs between
    devices and versions: see stage_tap.

    Dtypes: fp32, fp64, bf16, fp16; shift in u's dtype or fp32, residual in any of the four, each rounded to u's; a residual of another
    dtype than u's takes a pass of its own. Autocast changes nothing.

    For backward v is kept and nothing else; without an activation nothing is. The gradient of u is written once and is that of the residual
    too. v must not be changed in place where a gradient is wanted, as with F.relu. NaN and -0 behave as in PyTorch.
    Differentiable once in u, shift and residual; a second differentiation raises NotImplementedError.

    Raises ValueError or TypeError, naming the argument, what was expected and what came.
    """
    if isinstance(u, Proxy):
        return _fx.leaf(stage_end, u, shift, residual, activation=activation)
    _validate.end(u, shift, residual)
    activation = _options.activation_name(activation)
    route = _tracing.route()
    if not _serves(u) or route in (_tracing.PLAIN, _tracing.ONNX):
        return reference.stage_end(u, shift, residual, activation)
    if residual is not None and residual.dtype is not u.dtype:
        residual = residual.to(u.dtype)
    return ops.stage_end(u, shift, residual, activation, route)
