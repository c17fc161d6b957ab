"""What torch.utils.flop_counter counts for our operators: the matrix products of the same computation in plain PyTorch.

A multiplication and an addition are two. Like FlopCounterMode itself this leaves out what is no product: pooling, ReLU, sums and
multiplications element by element. So a head counts the same fused and in plain PyTorch, in every attention mode, forward and backward;
pooling, stage tap and stage end count nothing.
"""

from collections.abc import Sequence
from typing import Any

from .._on_import import when_imported
from ._library import OPERATORS

Shape = Sequence[int]


def _attention(attention: str, batch: int, stages: int, classes: int) -> int:
    """Of y from Z [B, n, K]: "nxn" and "gated" multiply by M [n, n], "hard" and "1xn" by w [n], the others element by element."""
    outputs = {"nxn": stages, "gated": stages, "hard": 1, "1xn": 1}.get(attention, 0)
    return 2 * batch * classes * stages * outputs


def head(
    features: Sequence[Shape],
    weight: Shape,
    bias: Shape | None,
    attention_weight: Shape | None,
    attention_bias: Shape | None,
    attention: str,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """z_i = p_i W_i^T of every stage, and the attention."""
    classes, width = weight
    return 2 * features[0][0] * classes * width + _attention(attention, features[0][0], len(features), classes)


def head_backward(
    dy: Shape | None,
    dbranches: Shape | None,
    pooled: Shape,
    weight: Shape,
    bias: Shape | None,
    attention_weight: Shape | None,
    attention_bias: Shape | None,
    attention: str,
    widths: Sequence[int],
    feature_stages: Sequence[int],
    need_weight: bool,
    need_bias: bool,
    need_attention: bool,
    *_: Any,
    out_shape: Any = None,
    **__: Any,
) -> int:
    """dW_i = dz_i^T p_i, dp_i = dz_i W_i where they are wanted, and the attention's two: the gradient of Z and that of its weight."""
    batch, classes = pooled[0], weight[0]
    columns = (sum(widths) if need_weight else 0) + sum(widths[i] for i in feature_stages)
    of_scores = need_weight or need_bias or len(feature_stages) > 0
    through = 0 if dy is None else _attention(attention, batch, len(widths), classes)
    return 2 * batch * classes * columns + through * (of_scores + need_attention)


def nothing(*_: Any, out_shape: Any = None, **__: Any) -> int:
    """No product."""
    return 0


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    register_flop_formula(OPERATORS.interflow_head)(head)
    register_flop_formula(OPERATORS.interflow_head_backward)(head_backward)
    for name in ("interflow_pool", "stage_tap", "stage_tap_backward", "stage_end", "stage_end_backward"):
        register_flop_formula(getattr(OPERATORS, name))(nothing)


when_imported("torch.utils.flop_counter", _register)  # which takes a second to import, for Triton
