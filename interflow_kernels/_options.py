"""Checks of sizes, switches and names among the public arguments: one sentence naming the argument, what was expected and what came."""

import numbers
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reference import ACTIVATIONS, ATTENTIONS

MAX_STAGES = 16
LAYOUTS = ("NCHW", "NHWC")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES_TEXT = "fp32, fp64, bf16 or fp16"
_LARGEST = 2**63 - 1


def shown(value: Any) -> str:
    """What came, for the end of a sentence: on one line, and short."""
    if isinstance(value, Tensor) or (type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"):
        return f"{type(value).__name__} of {value.dtype}"
    try:
        text = repr(value)
    except Exception:  # a broken __repr__ must not hide the sentence
        text = ""
    return text if 0 < len(text) <= 100 and "\n" not in text else type(value).__name__


def integer(value: Any) -> int | None:
    """`value` as an int where it is one, numpy's included, else None. A bool is no size."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def flag(value: Any, name: str) -> bool:
    """True or False, numpy's included; nothing else is taken for one."""
    if value is True or value is False:
        return value
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {shown(value)}")


def pair(value: Any, name: str) -> tuple[int, int]:
    """An int, or two, as (Sh, Sw); each at least 1."""
    if type(value) is int:
        first = second = value
    else:
        given = value if isinstance(value, (tuple, list)) else (value, value)
        both = [integer(v) for v in given]
        if len(both) != 2 or both[0] is None or both[1] is None:
            raise TypeError(f"{name} must be an int or a pair of ints, got {shown(value)}")
        first, second = both[0], both[1]
    if first < 1 or second < 1:
        raise ValueError(f"{name} must be at least 1 in both directions, got {shown(value)}")
    return first, second


def attention_mode(attention: Any) -> str:
    if not isinstance(attention, str) or attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {shown(attention)}")
    return str(attention)


def activation_name(activation: Any) -> str:
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {shown(activation)}")
    return str(activation)


def layouts(layout: Any, num_stages: int) -> tuple[str, ...]:
    """One of LAYOUTS for each stage, from one string for all or a sequence of one for each."""
    if isinstance(layout, str) and layout in LAYOUTS:
        return (layout,) * num_stages
    if not isinstance(layout, (str, list, tuple)):
        raise TypeError(f"layout must be 'NCHW' or 'NHWC', or a sequence of one for each stage, got {shown(layout)}")
    each = (layout,) if isinstance(layout, str) else tuple(layout)
    for value in each:
        if not isinstance(value, str) or value not in LAYOUTS:
            raise ValueError(f"layout must be 'NCHW' or 'NHWC', got {shown(value)}")
    if len(each) != num_stages:
        raise ValueError(f"layout must be one string or {num_stages}, one for each stage, got {len(each)}: {shown(layout)}")
    return each


def stage_count(count: int, name: str) -> None:
    if not 1 <= count <= MAX_STAGES:
        raise ValueError(f"{name} must name 1 to {MAX_STAGES} stages, got {count}")


def positive_ints(values: Any, name: str) -> tuple[int, ...]:
    """A sequence of ints, each at least 1."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a sequence of ints, got {shown(values)}")
    sizes = []
    for value in values:
        size = integer(value)
        if size is None:
            raise TypeError(f"{name} must be a sequence of ints, got {shown(value)} in it")
        if size < 1:
            raise ValueError(f"{name} must be at least 1 everywhere, got {shown(tuple(values))}")
        sizes.append(size)
    return tuple(sizes)


def class_count(num_classes: Any) -> int:
    count = integer(num_classes)
    if count is None:
        raise TypeError(f"num_classes must be an int, got {shown(num_classes)}")
    if count < 1:
        raise ValueError(f"num_classes must be at least 1, got {count}")
    return count


def weight_size(in_channels: tuple[int, ...], num_classes: int, pool_size: tuple[int, int] = (1, 1)) -> None:
    """Raises where a weight [K, D] of these sizes has more bytes than 64 bits count."""
    columns = sum(in_channels) * pool_size[0] * pool_size[1]
    if 8 * columns * max(num_classes, 1) > _LARGEST:
        raise ValueError(f"in_channels, pool_size and num_classes must give a weight of fewer than 2^60 numbers, got {num_classes} x {columns}")


def loss_weight(value: Any, name: str = "weight") -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a finite number of at least 0, got {shown(value)}")
    number = float(value)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} must be a finite number of at least 0, got {number}")
    return number


def factory(device: Any, dtype: Any) -> dict[str, Any]:
    """The constructor's `device` and `dtype`, as torch.empty takes them."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, {DTYPES_TEXT}, got {shown(dtype)}")
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"dtype must be floating point, {DTYPES_TEXT}, got {dtype}")
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError, ValueError):
            raise ValueError(f"device must be one that torch knows, such as 'cpu', 'cuda:0' or 'meta', got {shown(device)}") from None
    return {"device": device, "dtype": dtype}
