"""Checks of the public arguments: one clear sentence naming the argument, what was expected and what came."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import ATTENTIONS, autocast_dtype

MAX_STAGES = 16
LAYOUTS = ("NCHW", "NHWC")
TAP_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pair(value: Any, name: str) -> tuple[int, int]:
    """An int, or two, as (Sh, Sw); each at least 1."""
    both = (value, value) if isinstance(value, int) else value
    if not isinstance(both, (tuple, list)) or len(both) != 2 or not all(isinstance(v, int) for v in both):
        raise TypeError(f"{name} must be an int or a pair of ints, got {value!r}")
    if both[0] < 1 or both[1] < 1:
        raise ValueError(f"{name} must be at least 1 in both directions, got {value!r}")
    return both[0], both[1]


def attention_mode(attention: Any) -> str:
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}")
    return str(attention)


def layouts(layout: Any, num_stages: int) -> tuple[str, ...]:
    """One of LAYOUTS for each stage, from one string for all or a sequence of one for each."""
    each = (layout,) * num_stages if isinstance(layout, str) else tuple(layout)
    if len(each) != num_stages:
        raise ValueError(f"layout must be one string or {num_stages}, one for each stage, got {len(each)}: {layout!r}")
    for value in each:
        if value not in LAYOUTS:
            raise ValueError(f"layout must be 'NCHW' or 'NHWC', got {value!r}")
    return each


def stage_count(count: int, name: str) -> None:
    if not 1 <= count <= MAX_STAGES:
        raise ValueError(f"{name} must name 1 to {MAX_STAGES} stages, got {count}")


def positive_ints(values: Any, name: str) -> tuple[int, ...]:
    """A non-empty sequence of ints, each at least 1."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be a sequence of ints, got {values!r}")
        if value < 1:
            raise ValueError(f"{name} must be at least 1 everywhere, got {tuple(values)}")
    return tuple(values)


def class_count(num_classes: Any) -> int:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes must be an int, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return num_classes


def hard_weights(values: Any, num_stages: int) -> tuple[float, ...]:
    """n finite numbers from a sequence or a tensor [n]."""
    listed = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(listed) != num_stages:
        raise ValueError(f"hard_weights must have {num_stages} values, one for each stage, got {len(listed)}")
    for value in listed:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"hard_weights must be numbers, got {value!r}")
        if value != value or value in (float("inf"), float("-inf")):
            raise ValueError(f"hard_weights must be finite, got {listed}")
    return tuple(float(value) for value in listed)


def as_nchw(features: Sequence[Tensor], layout: tuple[str, ...], pool_size: tuple[int, int]) -> list[Tensor]:
    """Views in [B, C, H, W] (or [B, D_i]) of features that may be [B, H, W, C] or tokens [B, N, C]; nothing is copied."""
    views = []
    for i, (x, order) in enumerate(zip(features, layout, strict=True)):
        if not isinstance(x, Tensor):
            raise TypeError(f"features[{i}] must be a tensor, got {type(x).__name__}")
        if order == "NHWC" and x.dim() == 4:
            x = x.permute(0, 3, 1, 2)
        elif order == "NHWC" and x.dim() == 3:
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

    Rank, batch, channels (where `in_channels` is known), extent, device and dtype are looked at; the data are not.
    """
    if not isinstance(given, (list, tuple)):
        given = listed(given)
    if len(given) != num_stages:
        raise ValueError(f"features must have {num_stages} tensors, one for each stage, got {len(given)}")
    if "NHWC" in layout:
        given = as_nchw(given, layout, pool_size)
    batch = None
    dtype, device = weight.dtype, weight.device
    for i, x in enumerate(given):
        if not isinstance(x, Tensor):
            raise TypeError(f"features[{i}] must be a tensor, got {type(x).__name__}")
        shape = x.shape
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
    if not x.is_floating_point():
        raise TypeError(f"features[{i}] must be floating point, got {x.dtype}")
    if torch.float64 not in (x.dtype, weight.dtype):
        if autocast_dtype(weight) is not None:
            return
        if x.dim() == 2 and x.dtype == torch.float32:
            return
    raise TypeError(f"features[{i}] must have the dtype of weight, {weight.dtype}, got {x.dtype}; torch.autocast allows fp32, bf16 and fp16 side by side")


def parameters(
    weight: Tensor,
    bias: Tensor | None,
    attention: str,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    num_stages: int,
    width: int,
) -> None:
    """Shapes, dtypes and devices of the head's parameters, against n stages and D = `width` pooled values."""
    if weight.dim() != 2:
        raise ValueError(f"weight must be [K, D], got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    k, d = weight.shape
    if k == 0:
        raise ValueError(f"weight [K, D] must have at least one class, got shape {tuple(weight.shape)}")
    if d != width:
        raise ValueError(f"weight must have D = {width} columns, the sum of the features' pooled values, got {d}")
    n = num_stages
    weight_shape = {"hard": (n,), "1xn": (n,), "nxn": (n, n), "classwise": (n, k), "gated": (n, n)}[attention]
    bias_shape = {"hard": None, "1xn": (1,), "nxn": (n,), "classwise": (k,), "gated": (n,)}[attention]
    if attention_weight is None:
        raise ValueError(f"attention_weight must be {list(weight_shape)} for attention={attention!r}, got None")
    if attention == "gated" and attention_bias is None:
        raise ValueError(f"attention_bias must be {[n]} for attention='gated', got None")
    if attention == "hard" and attention_bias is not None:
        raise ValueError("attention_bias must be None for attention='hard'")
    for name, tensor, shape in (
        ("bias", bias, (n, k)),
        ("attention_weight", attention_weight, weight_shape),
        ("attention_bias", attention_bias, bias_shape),
    ):
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {list(shape or ())} for attention={attention!r}, got shape {tuple(tensor.shape)}")
        if tensor.dtype != weight.dtype:
            raise TypeError(f"{name} must have the dtype of weight, {weight.dtype}, got {tensor.dtype}")
        if tensor.device != weight.device:
            raise ValueError(f"{name} must be on the device of weight, {weight.device}, got {tensor.device}")


def tap(u: Any, shift: Any) -> None:
    """u [B, C, H, W] floating and not empty in H or W; shift [C] in u's dtype or fp32, on u's device, or None."""
    if not isinstance(u, Tensor):
        raise TypeError(f"u must be a tensor, got {type(u).__name__}")
    shape = u.shape
    if len(shape) != 4:
        raise ValueError(f"u must be [B, C, H, W], got shape {tuple(shape)}")
    if u.dtype not in TAP_DTYPES:
        raise TypeError(f"u must be fp32, fp64, bf16 or fp16, got {u.dtype}")
    if shape[2] == 0 or shape[3] == 0:
        raise ValueError(f"u must have H and W of at least 1, got shape {tuple(shape)} as [B, C, H, W]")
    if shift is None:
        return
    if not isinstance(shift, Tensor):
        raise TypeError(f"shift must be a tensor or None, got {type(shift).__name__}")
    if shift.dim() != 1 or shift.shape[0] != shape[1]:
        raise ValueError(f"shift must be [C] with the {shape[1]} channels of u, got shape {tuple(shift.shape)}")
    if shift.dtype is not u.dtype and shift.dtype is not torch.float32:
        raise TypeError(f"shift must have the dtype of u, {u.dtype}, or be fp32, got {shift.dtype}")
    if shift.device != u.device:
        raise ValueError(f"shift must be on the device of u, {u.device}, got {shift.device}")
