"""What both operators' Triton sides ask of their arguments, with one sentence; and how they remember tensors that passed."""

from collections.abc import Sequence
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


def check_map(operator: str, u: Description, shift: Description | None) -> None:
    """u [B, C, H, W], not empty in H or W; shift [C] in u's dtype or fp32, on u's device."""
    if not (len(u.shape) == 4 and min(u.shape[2:]) > 0):
        fail(f"{operator}: u must be [B, C, H, W] with H and W of at least 1, got {list(u.shape)}")
    check_dtype(operator, "u", u.dtype)
    if shift is None:
        return
    if list(shift.shape) != [u.shape[1]]:
        fail(f"{operator}: shift must be [{u.shape[1]}], got {list(shift.shape)}")
    if shift.dtype not in (u.dtype, torch.float32):
        fail(f"{operator}: shift must have the dtype of u, {u.dtype}, or be fp32, got {shift.dtype}")
    if shift.device != u.device:
        fail(f"{operator}: shift must be on the device of u, {u.device}, got {shift.device}")


def check_same(operator: str, name: str, t: Description, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
    """A tensor of this shape and dtype, on this device."""
    if list(t.shape) != list(shape):
        fail(f"{operator}: {name} must be {list(shape)}, got {list(t.shape)}")
    if t.dtype != dtype:
        fail(f"{operator}: {name} must be {dtype}, got {t.dtype}")
    if t.device != device:
        fail(f"{operator}: {name} must be on {device}, got {t.device}")


def contiguous(t: Tensor | None) -> Tensor | None:
    return t if t is None or t.is_contiguous() else t.contiguous()
