"""Random arguments: tensors of every kind, dtype and layout in memory, sizes and switches, and wrong values of each."""

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

INFINITE_ATTENTION = False
"""Whether infinities are drawn in attention weights, in biases, in dy, and in what "nxn" and "gated" weigh. Off until it is settled what holds there."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OTHER_DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)
Random = random.Random


def chance(r: Random, probability: float) -> bool:
    return r.random() < probability


def size(r: Random, most: int = 9) -> int:
    """Small, now and then 0 or 1."""
    drawn = r.random()
    return 0 if drawn < 0.03 else 1 if drawn < 0.2 else r.randint(2, most)


def dtype(r: Random) -> torch.dtype:
    return r.choices(FLOATS, (6, 2, 2, 2))[0]


def numbers(r: Random, shape: tuple[int, ...], kind: torch.dtype, special: str = "") -> Tensor:
    """Normally distributed; special: "", "nan" or "infinite", strewn in beside -0 and subnormals."""
    generator = torch.Generator().manual_seed(r.getrandbits(60))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    if special:
        small = torch.finfo(kind).smallest_normal / 4
        strewn = [float("nan"), 0.0, -0.0, small, -small] + ([float("inf"), -float("inf")] if special == "infinite" else [])
        chosen = torch.tensor(strewn, dtype=torch.float64)[torch.randint(len(strewn), shape, generator=generator)]
        values = torch.where(torch.rand(shape, generator=generator) < r.choice((0.02, 0.3)), chosen, values)
    return values.to(kind)


def placed(r: Random, t: Tensor) -> Tensor:
    """t elsewhere in memory: other strides, an offset, expanded or overlapping (which changes its values), with a lazy minus, as a Parameter."""
    way = r.choice(("as it is", "as it is", "channels last", "sliced", "permuted", "expanded", "overlapping", "offset", "negated", "parameter", "stepped"))
    if way == "channels last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if way == "sliced" and t.dim():
        larger = t.new_full([n + 3 for n in t.shape], float("nan"))
        view = larger[tuple(slice(1, 1 + n) for n in t.shape)]
        return view.copy_(t)
    if way == "permuted" and t.dim() > 1:
        order = r.sample(range(t.dim()), t.dim())
        return t.permute(order).contiguous().permute([order.index(i) for i in range(t.dim())])
    if way == "expanded" and t.dim() and t.numel():
        d = r.randrange(t.dim())
        return t.narrow(d, 0, 1).expand(t.shape)
    if way == "overlapping" and t.dim() and t.numel():
        strides = [r.choice((0, 1, 1, 2, 3)) for _ in t.shape]
        need = 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))
        return t.flatten()[torch.arange(need) % t.numel()].as_strided(t.shape, strides)
    if way == "offset":
        return torch.cat([t.new_full((r.randint(1, 5),), float("nan")), t.flatten()])[-t.numel() :].view(t.shape) if t.numel() else t
    if way == "negated":
        return torch._neg_view(t)
    if way == "parameter":
        return torch.nn.Parameter(t, requires_grad=False)
    if way == "stepped" and t.dim():
        return t.repeat_interleave(2, -1)[..., ::2]
    return t


def _nested(t: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([t.detach(), t.detach()], layout=layout)


def wrong_tensor(r: Random, good: Any) -> Any:
    """Anything but what `good` is: not a tensor, another layout, dtype, device or shape."""
    t = good if isinstance(good, Tensor) else torch.randn(r.choice(((), (3,), (2, 3), (2, 3, 4, 4))))
    t = t.detach()
    shape = list(t.shape)
    ways: list[Any] = [
        lambda: None,
        lambda: r.choice((3, 1.5, "x", [1.0], (t,), [t], {}, np.ones(shape or [1], np.float32), object(), torch.float32)),
        lambda: t.to(r.choice(OTHER_DTYPES)),
        lambda: t.to(r.choice(FLOATS)),
        lambda: t.to("meta"),
        lambda: t.float().to_sparse(),
        lambda: t.float().resolve_neg().contiguous().to_mkldnn(),
        lambda: t.float().to_sparse_csr() if t.dim() == 2 else t.float().to_sparse(),
        lambda: _nested(t, r.choice((torch.strided, torch.jagged))),
        lambda: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
        lambda: t[None],
        lambda: t[0] if shape and shape[0] else t[None],
        lambda: torch.tensor(1.0),
        lambda: t.new_empty(0),
        lambda: t.transpose(-1, -2) if len(shape) > 1 else t,
        lambda: t.new_ones([n + (i == 0) for i, n in enumerate(shape)]),
        lambda: t.new_ones([n + (i == len(shape) - 1) for i, n in enumerate(shape)]),
        lambda: t.new_ones([0 if i == r.randrange(4) else n for i, n in enumerate(shape)]),
        lambda: torch.zeros((), dtype=t.dtype).expand([2**40 if i == 0 else n for i, n in enumerate(shape)]),
        lambda: torch.zeros((), dtype=t.dtype).expand([2**40 if i == 1 else n for i, n in enumerate(shape)]),
        lambda: torch._efficientzerotensor(shape) if t.dtype == torch.float32 else t,
    ]
    try:
        return r.choice(ways)()
    except (RuntimeError, NotImplementedError, ValueError, TypeError, AttributeError):  # this tensor has no such form
        return None


def wrong_size(r: Random) -> Any:
    whole = (0, -1, 2**33, 2**62, 2**70, -(2**70), np.int64(2), np.int32(0), torch.tensor(2))
    pairs = ((2,), (2, 2, 2), [1, 2], [], (1, None), (True, 1), (2**40, 2**40), np.array([1, 2]))
    return r.choice((*whole, *pairs, True, 1.5, "2", b"2", None, np.float32(1), {}, float("nan")))


def wrong_flag(r: Random) -> Any:
    return r.choice(("yes", None, 1, 0, np.True_, np.bool_(False), [], 0.5, torch.tensor(True), np.array([True])))


def wrong_name(r: Random) -> Any:
    return r.choice(("", "folded", "NXN", "nxn ", None, [], 3, b"nxn", np.array(["nxn", "hard"]), torch.ones(2), ("nxn",), "x" * 500, "1xn", "gated"))


def wrong_layout(r: Random, stages: int) -> Any:
    return r.choice(
        (1, None, "NWHC", "", ["NCHW"] * (stages + 1), [], [1] * stages, ("NHWC",) * stages, "NHWC", {"NCHW"}, torch.strided, np.array(["NCHW", "x"]))
    )
