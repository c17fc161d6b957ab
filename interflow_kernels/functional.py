"""The documented functions: validate, choose the backend, call."""

from collections.abc import Sequence

from torch import Tensor

from . import _backend, _native, _validate, reference

if _native.cpu_error is None:
    from . import ops


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
    if _backend.select(weight.device.type) == "eager":
        return reference.interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size)
    return ops.interflow_head(features, weight, bias, attention_weight, attention_bias, attention, pool_size, need_branches)


def interflow_head(
    features: Sequence[Tensor],
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
    or, already pooled, [B, D_i], D_i = C_i * Sh * Sw; weight [K, D], D = sum D_i; bias [n, K]; attention_weight and
    attention_bias as the table of InterflowHead says. Returns y [B, K], with `return_branches` also Z [B, n, K].

    Dtypes: fp32, fp64, bf16, fp16, one for all; pooled features may be fp32 beside bf16 or fp16. Under autocast each
    feature may have its own and y has the autocast dtype. Sums accumulate in fp32 or wider.

    Differentiable once in features, weight, bias and attention; a second differentiation raises NotImplementedError.
    Raises ValueError or TypeError, naming the argument, what was expected and what came.
    Source: Z. Cai, arXiv 2106.14073.
    """
    mode = _validate.attention_mode(attention)
    pool = _validate.pair(pool_size, "pool_size")
    if not isinstance(features, (list, tuple)):
        raise TypeError(f"features must be a list or tuple of tensors, one for each stage, got {type(features).__name__}")
    n = len(features)
    _validate.stage_count(n, "features")
    checked = _validate.features(features, weight, n, pool, _validate.layouts(layout, n))
    width = sum(x.shape[1] * (pool[0] * pool[1] if x.dim() == 4 else 1) for x in checked)
    _validate.parameters(weight, bias, mode, attention_weight, attention_bias, n, width)
    y, branches = run_head(checked, weight, bias, attention_weight, attention_bias, mode, pool, return_branches)
    if not return_branches:
        return y
    assert branches is not None
    return y, branches
