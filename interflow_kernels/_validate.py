"""Checks of the tensors among the public arguments: one sentence naming the argument, what was expected and what came.

Kind, layout, dtype, device and shape are looked at; the data are not.
"""

import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ._options import DTYPES, DTYPES_TEXT, shown
from .reference import autocast_dtype

_STRIDED = torch.strided


def not_a_tensor(value: Any, name: str, expected: str = "a tensor") -> NoReturn:
    data = isinstance(value, (list, tuple, int, float)) or type(value).__module__ == "numpy"
    raise TypeError(f"{name} must be {expected}, got {type(value).__name__}" + ("; torch.as_tensor makes one of it" if data else ""))


def dense(t: Tensor, name: str) -> None:
    """Raises for the tensors that are no array of numbers with strides: sparse, nested, mkldnn, quantized."""
    if t.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; torch.nested.to_padded_tensor makes it dense")
    if t.layout is not _STRIDED:
        raise TypeError(f"{name} must be a dense tensor, got layout {t.layout}; to_dense() makes it dense")
    if t.is_quantized:
        raise TypeError(f"{name} must be floating point, {DTYPES_TEXT}, got {t.dtype}; dequantize() makes it fp32")


def floating(t: Any, name: str) -> None:
    """Raises unless t is a dense tensor of one of DTYPES."""
    if not isinstance(t, Tensor):
        not_a_tensor(t, name)
    if t.layout is not _STRIDED or t.dtype not in DTYPES or t.is_nested:
        dense(t, name)
        raise TypeError(f"{name} must be floating point, {DTYPES_TEXT}, got {t.dtype}")


def as_nchw(features: Sequence[Tensor], layout: tuple[str, ...], pool_size: tuple[int, int]) -> list[Tensor]:
    """Views in [B, C, H, W] (or [B, D_i]) of features that may be [B, H, W, C] or tokens [B, N, C]; nothing is copied."""
    views = []
    for i, (x, order) in enumerate(zip(features, layout, strict=True)):
        if not isinstance(x, Tensor):
            not_a_tensor(x, f"features[{i}]")
        if order == "NHWC":
            if x.layout is not _STRIDED or x.is_nested:
                dense(x, f"features[{i}]")
            if x.dim() == 4:
                x = x.permute(0, 3, 1, 2)
            elif x.dim() == 3:
                if pool_size != (1, 1):
                    raise ValueError(f"features[{i}] are tokens {tuple(x.shape)}, which have no rows and columns: pool_size must be 1, got {pool_size}")
                x = x.transpose(1, 2).unsqueeze(3)
        views.append(x)
    return views


def listed(given: Any) -> list[Any]:
    """The values of a mapping of features, in its order."""
    if isinstance(given, Mapping):
        return list(given.values())
    raise TypeError(f"features must be a list, a tuple or a mapping of tensors, one for each stage, got {type(given).__name__}")


def features(
    given: Any,
    weight: Tensor,
    num_stages: int,
    pool_size: tuple[int, int],
    layout: tuple[str, ...],
    in_channels: tuple[int, ...] | None = None,
) -> list[Tensor]:
    """The features as [B, C_i, H_i, W_i] or [B, D_i] views, or one sentence about the first that does not fit.

    Kind, layout, rank, batch, channels (where `in_channels` is known), extent, device and dtype, in one pass.
    """
    if not isinstance(given, (list, tuple)):
        given = listed(given)
    if len(given) != num_stages:
        raise ValueError(f"features must have {num_stages} tensors, one for each stage, got {len(given)}")
    dtype, device = weight.dtype, weight.device
    if dtype not in DTYPES or weight.layout is not _STRIDED:
        floating(weight, "weight")
    if "NHWC" in layout:
        given = as_nchw(given, layout, pool_size)
    batch = None
    for i, x in enumerate(given):
        if not isinstance(x, Tensor):
            not_a_tensor(x, f"features[{i}]")
        if x.layout is not _STRIDED:
            dense(x, f"features[{i}]")
        try:
            shape = x.shape
        except RuntimeError:  # nested tensors have none
            dense(x, f"features[{i}]")
            raise
        rank = len(shape)
        if rank != 4 and rank != 2:
            expected = "[B, H, W, C], [B, N, C] or [B, D_i]" if layout[i] == "NHWC" else "[B, C, H, W] or, already pooled, [B, D_i]"
            raise ValueError(f"features[{i}] must be {expected} (layout={layout[i]!r}), got shape {tuple(shape)}")
        if batch is None:
            batch = shape[0]
        elif shape[0] != batch:
            raise ValueError(f"features[{i}] must have the batch of features[0], {batch}, got {shape[0]} (shape {tuple(shape)})")
        if in_channels is not None:
            width = in_channels[i] if rank == 4 else in_channels[i] * pool_size[0] * pool_size[1]
            if shape[1] != width:
                what = "channels" if rank == 4 else "pooled values (in_channels * pool_size)"
                raise ValueError(f"features[{i}] must have {width} {what}, got {shape[1]} (shape {tuple(shape)} as [B, C, ...])")
        if rank == 4 and (shape[2] == 0 or shape[3] == 0):
            raise ValueError(f"features[{i}] must have H and W of at least 1, got shape {tuple(shape)} as [B, C, H, W]")
        if x.device != device:
            raise ValueError(f"features[{i}] must be on the device of weight, {device}, got {x.device}")
        if x.dtype is not dtype:
            feature_dtype(i, x, weight)
    return list(given)


def feature_dtype(i: int, x: Tensor, weight: Tensor) -> None:
    """Raises unless a feature whose dtype is not that of `weight` may stand beside it."""
    floating(x, f"features[{i}]")
    if torch.float64 not in (x.dtype, weight.dtype):
        if autocast_dtype(weight) is not None:
            return
        if x.dim() == 2 and x.dtype == torch.float32:
            return
    raise TypeError(f"features[{i}] must have the dtype of weight, {weight.dtype}, got {x.dtype}; torch.autocast allows fp32, bf16 and fp16 side by side")


def attention_shapes(attention: str, n: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Of attention_weight and attention_bias, for n stages and K classes; None where the mode has no bias."""
    if attention == "nxn" or attention == "gated":
        return (n, n), (n,)
    if attention == "classwise":
        return (n, k), (k,)
    return (n,), (1,) if attention == "1xn" else None


def parameters(
    weight: Tensor,
    bias: Tensor | None,
    attention: str,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    num_stages: int,
    width: int,
) -> None:
    """Shapes, dtypes and devices of the head's parameters, against n stages and D = `width` pooled values; weight is known to be floating."""
    try:
        shape = weight.shape
    except RuntimeError:  # nested tensors have none
        dense(weight, "weight")
        raise
    if len(shape) != 2:
        raise ValueError(f"weight must be [K, D], got shape {tuple(shape)}")
    k, d = shape
    if k == 0:
        raise ValueError(f"weight [K, D] must have at least one class, got shape {tuple(shape)}")
    if d != width:
        raise ValueError(f"weight must have D = {width} columns, the sum of the features' pooled values, got {d}")
    weight_shape, bias_shape = attention_shapes(attention, num_stages, k)
    if attention_weight is None:
        raise ValueError(f"attention_weight must be {list(weight_shape)} for attention={attention!r}, got None")
    if attention_bias is None:
        if attention == "gated":
            raise ValueError(f"attention_bias must be {[num_stages]} for attention='gated', got None")
    elif bias_shape is None:
        raise ValueError(f"attention_bias must be None for attention={attention!r}")
    else:
        parameter(attention_bias, "attention_bias", bias_shape, weight, f" for attention={attention!r}")
    parameter(attention_weight, "attention_weight", weight_shape, weight, f" for attention={attention!r}")
    if bias is not None:
        parameter(bias, "bias", (num_stages, k), weight, "")


def parameter(t: Any, name: str, shape: tuple[int, ...], weight: Tensor, where: str) -> None:
    """A dense tensor of this shape, with the dtype and on the device of `weight`."""
    if not isinstance(t, Tensor):
        not_a_tensor(t, name, "a tensor or None" if name != "attention_weight" else "a tensor")
    if t.layout is not _STRIDED or t.is_nested:
        dense(t, name)
    if t.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}{where}, got shape {tuple(t.shape)}")
    if t.dtype is not weight.dtype:
        raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {t.dtype}")
    if t.device != weight.device:
        raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {t.device}")


def tap(u: Any, shift: Any) -> None:
    """u [B, C, H, W] floating and not empty in H or W; shift [C] in u's dtype or fp32, on u's device, or None."""
    if not isinstance(u, Tensor):
        not_a_tensor(u, "u")
    if u.layout is not _STRIDED:
        dense(u, "u")
    try:
        shape = u.shape
    except RuntimeError:  # nested tensors have none
        dense(u, "u")
        raise
    if len(shape) != 4:
        raise ValueError(f"u must be [B, C, H, W], got shape {tuple(shape)}")
    dtype = u.dtype
    if dtype not in DTYPES:
        dense(u, "u")
        raise TypeError(f"u must be {DTYPES_TEXT}, got {dtype}")
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"u must have H and W of at least 1, got shape {tuple(shape)} as [B, C, H, W]")
    if shift is None:
        return
    if not isinstance(shift, Tensor):
        not_a_tensor(shift, "shift", "a tensor or None")
    if shift.layout is not _STRIDED:
        dense(shift, "shift")
    try:
        of_shift = shift.shape
    except RuntimeError:
        dense(shift, "shift")
        raise
    if len(of_shift) != 1 or of_shift[0] != shape[1]:
        raise ValueError(f"shift must be [C] with the {shape[1]} channels of u, got shape {tuple(of_shift)}")
    if shift.dtype is not dtype and shift.dtype is not torch.float32:
        raise TypeError(f"shift must have the dtype of u, {dtype}, or be fp32, got {shift.dtype}")
    if shift.device != u.device:
        raise ValueError(f"shift must be on the device of u, {u.device}, got {shift.device}")


def end(u: Any, shift: Any, residual: Any) -> None:
    """u and shift as tap() says; residual of u's shape, floating, on u's device, or None."""
    tap(u, shift)
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        not_a_tensor(residual, "residual", "a tensor or None")
    if residual.layout is not _STRIDED:
        dense(residual, "residual")
    try:
        shape = residual.shape
    except RuntimeError:
        dense(residual, "residual")
        raise
    if shape != u.shape:
        raise ValueError(f"residual must have the shape of u, {tuple(u.shape)}, got {tuple(shape)}")
    if residual.dtype not in DTYPES:
        dense(residual, "residual")
        raise TypeError(f"residual must be {DTYPES_TEXT}, got {residual.dtype}")
    if residual.device != u.device:
        raise ValueError(f"residual must be on the device of u, {u.device}, got {residual.device}")


def folded(weight: Any, bias: Any, width: int) -> None:
    """weight [K, D] with D = `width`, K of at least 1; bias [K]."""
    floating(weight, "weight")
    if weight.dim() != 2 or weight.shape[1] != width or weight.shape[0] == 0:
        raise ValueError(f"weight must be [K, {width}] with at least one class, got shape {tuple(weight.shape)}")
    if not isinstance(bias, Tensor):
        not_a_tensor(bias, "bias")
    parameter(bias, "bias", (weight.shape[0],), weight, "")


def logits(y: Any, target: Any, num_classes: int) -> None:
    """y [B, K], floating; target [B] of class numbers, or of probabilities [B, K]."""
    floating(y, "output")
    if y.dim() != 2 or y.shape[1] != num_classes:
        raise ValueError(f"output must be y [B, K] with K = {num_classes}, or y and Z [B, n, K] as forward_branches gives them, got shape {tuple(y.shape)}")
    _target(target, y.shape[0], num_classes, y, "output")


def scores(branches: Any, target: Any, num_stages: int, num_classes: int) -> None:
    """branches Z [B, n, K] of these n and K, floating; target [B] of class numbers, or of probabilities [B, K]."""
    floating(branches, "branches")
    if branches.dim() != 3 or branches.shape[1] != num_stages or branches.shape[2] != num_classes:
        expected = f"[B, n, K] with n = {num_stages} and K = {num_classes}, as forward gives them while training"
        raise ValueError(f"branches must be {expected}, got shape {tuple(branches.shape)}")
    _target(target, branches.shape[0], num_classes, branches, "branches")


def _target(target: Any, batch: int, classes: int, beside: Tensor, name: str) -> None:
    """target [B] of class numbers, or of probabilities [B, K], on the device of `beside`, which is called `name`."""
    if not isinstance(target, Tensor):
        not_a_tensor(target, "target")
    dense(target, "target")
    numbered = target.shape == (batch,) and target.dtype in (torch.int64, torch.uint8)
    if not numbered and not (target.shape == (batch, classes) and target.is_floating_point()):
        raise ValueError(
            f"target must be [{batch}] of class numbers in int64, or [{batch}, {classes}] of probabilities, got shape {tuple(target.shape)} of {target.dtype}"
        )
    if target.device != beside.device:
        raise ValueError(f"target must be on the device of {name}, {beside.device}, got {target.device}")


def hard_weights(values: Any, num_stages: int) -> tuple[float, ...]:
    """n finite numbers from a sequence or a tensor [n]."""
    if isinstance(values, Tensor):
        dense(values, "hard_weights")
        if values.dim() != 1 or values.device.type == "meta":
            raise ValueError(f"hard_weights must be {num_stages} numbers or a tensor of them, got shape {tuple(values.shape)} on {values.device}")
        values = values.tolist()
    elif isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__"):
        raise TypeError(f"hard_weights must be a sequence of {num_stages} numbers or a tensor of them, got {shown(values)}")
    try:
        listed = list(values)
    except TypeError:  # a numpy array without dimensions
        raise TypeError(f"hard_weights must be a sequence of {num_stages} numbers or a tensor of them, got {shown(values)}") from None
    if len(listed) != num_stages:
        raise ValueError(f"hard_weights must have {num_stages} values, one for each stage, got {len(listed)}")
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"hard_weights must be numbers, got {shown(value)}")
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"hard_weights must be finite, got {shown(listed)}")
    return tuple(float(value) for value in listed)
