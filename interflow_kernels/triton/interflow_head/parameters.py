"""The head's parameters as forward and backward check them, and the numbers that the kernels know the attentions by."""

from collections.abc import Sequence

import torch

from ..common.checks import Description, check_dtype, fail

MAX_STAGES = 16
MODES = {"hard": 0, "1xn": 0, "nxn": 1, "classwise": 2, "gated": 3, "folded": 4}


def check_parameters(operator: str, parameters: Sequence[Description | None], attention: str, n: int, width: int) -> None:
    """Shapes, dtypes and devices of weight, bias, attention_weight, attention_bias, as the compiled operators ask for them."""
    weight, _, attention_weight, attention_bias = parameters
    assert weight is not None
    if attention not in MODES:
        fail(f"{operator}: attention must be one of hard, 1xn, nxn, classwise, gated, folded, got {attention!r}")
    if not (len(weight.shape) == 2 and weight.shape[0] > 0):
        fail(f"{operator}: weight must be [K, D] with K of at least 1, got {list(weight.shape)}")
    if weight.shape[1] != width:
        fail(f"{operator}: weight must have D = {width} columns, the sum of the features' pooled values, got {list(weight.shape)}")
    k = weight.shape[0]
    shapes: dict[str, list[int] | None] = {
        "bias": [n, k],
        "attention_weight": {"nxn": [n, n], "gated": [n, n], "classwise": [n, k], "folded": None}.get(attention, [n]),
        "attention_bias": {"hard": None, "1xn": [1], "nxn": [n], "gated": [n]}.get(attention, [k]),
    }
    if (attention_weight is None) is not (attention == "folded"):
        fail(f"{operator}: attention_weight must be a tensor for every attention but 'folded', got {attention!r}")
    if attention_bias is None and attention == "gated":
        fail(f"{operator}: attention_bias must be a tensor for attention 'gated'")
    for name, t in zip(("weight", *shapes), parameters, strict=True):
        if t is None:
            continue
        check_dtype(operator, name, t.dtype)
        if t.device != weight.device:
            fail(f"{operator}: {name} must be on the device of weight, {weight.device}, got {t.device}")
        if name != "weight" and list(t.shape) != shapes[name]:
            fail(f"{operator}: {name} must be {shapes[name]} for attention {attention!r}, got {list(t.shape)}")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
