"""What both operators' Triton sides ask of their arguments, with one sentence."""

from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fail(sentence: str) -> NoReturn:
    raise RuntimeError(sentence)


def check_dtype(operator: str, name: str, t: Tensor) -> None:
    if t.dtype not in DTYPES:
        fail(f"{operator}: the Triton kernels take {name} in fp32, bf16 or fp16, got {t.dtype}; backend('eager') takes fp64")
