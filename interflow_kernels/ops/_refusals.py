"""What raw operators say to tensors that no kernel reads: sparse, nested, mkldnn and quantized ones, and to a mixture with meta tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _validate
from .._namespace import NAMESPACE
from ._library import OPERATORS, library

_KINDS = ("Sparse", "SparseCsr", "Quantized", "NestedTensor")
_KEYS = (*(kind + device for kind in _KINDS for device in ("CPU", "CUDA")), "MkldnnCPU", "SparseMeta", "SparseCsrMeta", "NestedTensorMeta")


def _tensors(operator: str, arguments: tuple[Any, ...]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of each tensor among an operator's arguments; those of a list as features[i]."""
    names = [a.name for a in getattr(OPERATORS, operator).default._schema.arguments]
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (list, tuple)):
            yield from ((f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Tensor))


def _refusal(operator: str) -> Callable[..., Any]:
    def refuse(*arguments: Any) -> Any:
        for name, value in _tensors(operator, arguments):
            try:
                _validate.dense(value, name)
            except TypeError as error:
                raise RuntimeError(f"{operator}: {error}") from None
        raise RuntimeError(f"{operator}: every tensor must be a dense one")

    return refuse


def one_device(operator: str, *arguments: Any) -> None:
    """For fakes, which also serve meta tensors: raises where tensors lie on different devices."""
    first = None
    for name, value in _tensors(operator, arguments):
        if first is None:
            first = (name, value.device)
        elif value.device != first[1]:
            raise RuntimeError(f"{operator}: {name} must be on the device of {first[0]}, {first[1]}, got {value.device}")


for _operator in (
    "interflow_head",
    "interflow_head_backward",
    "interflow_pool",
    "stage_tap",
    "stage_tap_backward",
    "stage_end",
    "stage_end_backward",
):
    for _key in filter(torch._C._parse_dispatch_key, _KEYS):  # as far as this torch has them
        library.impl(f"{NAMESPACE}::{_operator}", _refusal(_operator), _key)
