"""How the stage tap's results lie in memory: strides of its maps, size of its mask (csrc/stage_tap/contract.h), for fakes and for the Triton kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def runs_along_channels(shape: Sequence[Any], strides: Sequence[Any]) -> bool:
    """Whether the kernels take a map of this shape and strides as NHWC, and give m and du in channels_last.

    They do where the channels of a pixel lie together and the strides of C, W, H, B grow in this order. A dimension of size 1 does not
    count; an image may be repeated (stride 0). All else comes contiguous. csrc/common/feature_map.h has the same rule.
    """
    if not (strides[1] == 1 and shape[1] > 1):
        return False
    last: Any = 1
    for d in (3, 2):
        if shape[d] == 1:
            continue
        if strides[d] <= last:
            return False
        last = strides[d]
    return bool(strides[0] > last or strides[0] == 0 or shape[0] == 1)  # in this order: under torch.compile B may be unknown


def is_channels_last(u: Tensor) -> bool:
    return runs_along_channels(u.shape, u.stride())


def new_map(like: Tensor, shape: Sequence[Any], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """[B, C, H, W] on the device of `like`, in channels_last or contiguous memory."""
    batch, channels, height, width = shape
    if channels_last:
        return like.new_empty((batch, height, width, channels), dtype=dtype).permute(0, 3, 1, 2)
    return like.new_empty((batch, channels, height, width), dtype=dtype)


def mask_bytes(shape: Sequence[Any], max_pool: bool, channels_last: bool) -> Any:
    """Bytes of the mask of a u [B, C, H, W]."""
    batch, channels, height, width = shape
    if max_pool:
        return batch * channels * ((height + 1) // 2) * ((width + 1) // 2)
    if channels_last:
        return batch * height * width * ((channels + 7) // 8)
    return batch * channels * ((height * width + 7) // 8)
