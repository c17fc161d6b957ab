"""What both operators' Triton sides ask of their arguments, with one sentence; and how they remember tensors that passed."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Description(NamedTuple):
    """Of a tensor, what a launch depends on, but for its address."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


def described(t: Tensor | None) -> Any:
    """The fields of its Description: a plain tuple, as the key of what is found once."""
    return None if t is None else (t.shape, t.stride(), t.dtype, t.device)


def description(fields: Any) -> Description | None:
    return None if fields is None else Description(*fields)


def fail(sentence: str) -> NoReturn:
    raise RuntimeError(sentence)


def check_dtype(operator: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        fail(f"{operator}: the Triton kernels take {name} in fp32, bf16 or fp16, got {dtype}; backend('eager') takes fp64")


def contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()
