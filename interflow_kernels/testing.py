"""For tests: canonical cases, seeded inputs, one tolerance table, a comparator that names the worst element."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .modules import InterflowHead
from .reference import ATTENTIONS

__all__ = [
    "ATTENTIONS",
    "LAYOUTS",
    "TOLERANCE",
    "Counted",
    "EndCase",
    "HeadCase",
    "TapCase",
    "Tolerance",
    "assert_close",
    "assert_same_bits",
    "composed_end",
    "composed_end_gradient",
    "composed_tap",
    "composed_tap_gradient",
    "end_inputs",
    "exact_end_gradient",
    "gradients",
    "head_inputs",
    "in_layout",
    "magnitudes",
    "tap_inputs",
]


class Tolerance(NamedTuple):
    """|actual - expected| <= rounding * |expected| + sums * magnitude + one subnormal step of the dtype."""

    rounding: float  # the element itself, rounded once to its dtype
    sums: float  # what it is made of, beside the sum of the absolute products (`magnitudes`)


TOLERANCE = {
    # dtype: rounding, sums                           worst `sums` seen over the test suite (outputs and every gradient)
    torch.float64: Tolerance(0.0, 2e-15),  #          5.0e-16
    torch.float32: Tolerance(0.0, 8e-7),  #           2.3e-7
    torch.float16: Tolerance(2.0**-11, 8e-7),  #      none: one rounding to nearest; its sums are fp32's
    torch.bfloat16: Tolerance(2.0**-8, 8e-7),  #      3.2e-10, likewise
}

LAYOUTS = ("contiguous", "channels_last", "cropped", "sliced", "permuted", "expanded")


@dataclass(frozen=True)
class HeadCase:
    """Sizes of one head: maps are (C, H, W) of each stage."""

    batch: int = 3
    maps: Sequence[tuple[int, int, int]] = ((5, 13, 9), (32, 14, 14), (7, 3, 4))
    classes: int = 10
    attention: str = "nxn"
    pool_size: tuple[int, int] = (1, 1)
    bias: bool = True
    attention_bias: bool = True
    layout: str = "contiguous"
    dtype: torch.dtype = field(default=torch.float32)

    def head(self) -> InterflowHead:
        """The plain head in fp64, every parameter drawn at random, then rounded to the case's dtype."""
        attention_bias = self.attention_bias and self.attention != "hard"
        channels = [c for c, _, _ in self.maps]
        head = InterflowHead(
            channels, self.classes, self.attention, pool_size=self.pool_size, bias=self.bias, attention_bias=attention_bias, dtype=torch.float64
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for tensor in (*head.parameters(), *head.buffers()):
                drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.copy_(drawn / tensor.shape[1] ** 0.5 if tensor is head.weight else drawn)
        return head.to(self.dtype)


def in_layout(x: Tensor, layout: str) -> Tensor:
    """The values of x [B, C, H, W] in another memory layout; "expanded" repeats image 0 with stride 0 over the batch."""
    batch, channels, height, width = x.shape
    if layout == "contiguous":
        return x.contiguous()
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":  # cropped from a channels_last map: neither its pixels nor its rows follow each other
        return in_layout(x.permute(0, 2, 3, 1), "cropped").permute(0, 3, 1, 2)
    if layout == "cropped":
        larger = x.new_full((batch, channels + 2, height + 3, width + 1), float("nan"))
        larger[:, 1:-1, 2:-1, :-1] = x
        return larger[:, 1:-1, 2:-1, :-1]
    if layout == "permuted":
        return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)[:, :, :, :]
    if layout == "expanded":
        return x[:1].contiguous().expand(batch, -1, -1, -1)
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


def head_inputs(case: HeadCase, seed: int = 0) -> list[Tensor]:
    """One normally distributed map for each stage, in the case's dtype and layout."""
    generator = torch.Generator().manual_seed(seed)
    maps = [torch.randn(case.batch, *shape, generator=generator, dtype=torch.float64).to(case.dtype) for shape in case.maps]
    return [in_layout(x, case.layout) for x in maps]


@dataclass(frozen=True)
class TapCase:
    """One stage tap: u is [B, C, H, W]. shift: "none", "own" (u's dtype), "fp32" or "strided" (fp32, every third of more)."""

    shape: tuple[int, int, int, int] = (2, 19, 9, 13)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    max_pool: bool = True
    shift: str = "fp32"
    special: bool = False  # NaN of either sign, infinities, -0, subnormals and the largest fp16 numbers strewn in


def tap_inputs(case: TapCase, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """u, normally distributed in steps of 1/4 so that windows have ties, and shift, in the same steps."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: (torch.randn(*shape, generator=generator, dtype=torch.float64) * 4).round() / 4  # noqa: E731
    u, shift = draw(*case.shape), draw(3 * case.shape[1])
    if case.special:
        small = torch.finfo(case.dtype).smallest_normal / 4
        strewn = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, small, -small, 65504.0, -65504.0], dtype=torch.float64)
        for tensor, share in ((u, 0.3), (shift, 0.2)):
            chosen = strewn[torch.randint(len(strewn), tensor.shape, generator=generator)]
            tensor.copy_(torch.where(torch.rand(tensor.shape, generator=generator) < share, chosen, tensor))
    u, shift = u.to(case.dtype), shift.to(case.dtype if case.shift == "own" else torch.float32)
    if case.special:  # every other NaN becomes a negative one; a conversion between dtypes would lose the sign
        for tensor in (u, shift):
            words = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
            negative = tensor.isnan() & (torch.rand(tensor.shape, generator=generator) < 0.5)
            words.copy_(torch.where(negative, words | torch.iinfo(words.dtype).min, words))
    u = in_layout(u, case.layout)
    return u, None if case.shift == "none" else shift[::3] if case.shift == "strided" else shift[: case.shape[1]]


@dataclass(frozen=True)
class EndCase:
    """One stage end: u is [B, C, H, W]. shift, special: as of a TapCase; residual: its layout, or "none"."""

    shape: tuple[int, int, int, int] = (2, 19, 9, 13)
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    activation: str = "relu"
    shift: str = "fp32"
    residual: str = "contiguous"
    special: bool = False


def end_inputs(case: EndCase, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """u, shift and residual, normally distributed in steps of 1/4."""
    of_tap = TapCase(case.shape, case.dtype, case.layout, shift=case.shift, special=case.special)
    u, shift = tap_inputs(of_tap, seed)
    if case.residual == "none":
        return u, shift, None
    return u, shift, tap_inputs(replace(of_tap, layout=case.residual), seed + 1000)[0]


def _on_cpu(**tensors: Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, where PyTorch's operators have the bits that the kernels promise; got {t.device}; call .cpu() first")


def composed_end(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str = "relu") -> Tensor:
    """v of the stage end from PyTorch's own operators on the CPU, each step in u's dtype: the bits that it promises on every device."""
    _on_cpu(u=u, shift=shift, residual=residual)
    v = u if shift is None else u + shift.to(u.dtype)[:, None, None]
    v = v if residual is None else v + residual.to(u.dtype)
    return F.relu(v) if activation == "relu" else v


def composed_end_gradient(u: Tensor, shift: Tensor | None, residual: Tensor | None, activation: str, dv: Tensor | None, dp: Tensor | None) -> Tensor:
    """du of the stage end by PyTorch's autograd on the CPU; the bits that it promises for one upstream gradient, and for both in fp32 and fp64."""
    leaf = u.detach().requires_grad_()
    v = composed_end(leaf, shift, residual, activation)
    pairs = [(v, dv)] if dv is not None else []
    if dp is not None:
        pairs.append((v.mean((2, 3), dtype=dp.dtype), dp))
    (du,) = torch.autograd.grad([out for out, _ in pairs], leaf, [g for _, g in pairs])
    return du


def exact_end_gradient(v: Tensor, activation: str, dv: Tensor | None, dp: Tensor | None) -> Tensor:
    """du of the stage end in fp64, of v as it came out; summed over B, H, W it is dshift."""
    d = torch.zeros(v.shape, dtype=torch.float64)
    if dv is not None:
        d = d + dv.double()
    if dp is not None:
        d = d + dp.double()[:, :, None, None] / (v.shape[2] * v.shape[3])
    return torch.where(v <= 0, 0.0, d) if activation == "relu" else d


def composed_tap(u: Tensor, shift: Tensor | None, max_pool: bool = True) -> tuple[Tensor, Tensor | None]:
    """v and m of the stage tap from PyTorch's own operators on the CPU, each step in u's dtype; m is None without max-pool.

    These are the bits that the tap promises on every device. PyTorch's operators on a GPU may give others: relu(-0.0) is +0 on CUDA in
    torch 2.11 and -0 elsewhere. So an expectation is composed on the CPU; ValueError where u or shift lies on another device.
    """
    _on_cpu(u=u, shift=shift)
    v = F.relu(u if shift is None else u + shift.to(u.dtype)[:, None, None])
    if not max_pool:
        return v, None
    return v, F.max_pool2d(v, 2, 2) if min(u.shape[2:]) > 1 else v[:, :, : u.shape[2] // 2, : u.shape[3] // 2]


def composed_tap_gradient(u: Tensor, shift: Tensor | None, max_pool: bool, dm: Tensor | None, dp: Tensor | None) -> Tensor:
    """du of the stage tap by PyTorch's autograd on the CPU, of the upstream gradients that are given; the bits that the tap promises for one of them,
    and for both in fp32 and fp64 (below, PyTorch rounds each before it adds them). On CUDA PyTorch multiplies dp by the reciprocal of H * W
    where a CPU divides.
    """
    leaf = u.detach().requires_grad_()
    v, m = composed_tap(leaf, shift, max_pool)
    pairs = [(m, dm)] if m is not None and dm is not None else []
    if dp is not None:
        pairs.append((v.mean((2, 3), dtype=dp.dtype), dp))
    (du,) = torch.autograd.grad([out for out, _ in pairs], leaf, [g for _, g in pairs])
    return du


def gradients(
    head: InterflowHead, features: Sequence[Tensor], dy: Tensor | None, dbranches: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Outputs {"y", "branches"} and gradients by name: "features[i]" and each parameter. Features keep their strides."""
    leaves = [x.detach().requires_grad_() for x in features]
    named = [(f"features[{i}]", x) for i, x in enumerate(leaves)] + list(head.named_parameters())
    y, branches = head.forward_branches(leaves)
    pairs = [(out, g) for out, g in ((y, dy), (branches, dbranches)) if g is not None]
    got = torch.autograd.grad([o for o, _ in pairs], [t for _, t in named], [g.to(o.dtype) for o, g in pairs], allow_unused=True)
    return {"y": y.detach(), "branches": branches.detach()}, {name: g for (name, _), g in zip(named, got, strict=True)}


def magnitudes(head: InterflowHead, features: Sequence[Tensor], dy: Tensor | None, dbranches: Tensor | None) -> dict[str, Tensor]:
    """For each output and gradient, by the names of `gradients`, the sum of the absolute products it is made of, in fp64.

    An error is judged beside this sum: fp32 can do no better where products cancel, and no worse where they do not.
    For the linear modes that is the head with every number made positive. For "gated", with g the gates, s their arguments,
    |.| the positive head's: a gate's relative error is that of T_i = 1 + |s_i| + sum_l g_l |s_l|, and the rest follows.
    """
    positive = copy.deepcopy(head).double()
    with torch.no_grad():
        for tensor in (*positive.parameters(), *positive.buffers()):
            tensor.abs_()
    leaves = [x.detach().double().abs() for x in features]
    up = [None if g is None else g.double().abs() for g in (dy, dbranches)]
    if head.attention != "gated":
        outputs, grads = gradients(positive, leaves, *up)
        return outputs | {name: g for name, g in grads.items() if g is not None}

    named = [(f"features[{i}]", x.requires_grad_()) for i, x in enumerate(leaves)]
    named += [(name, t) for name, t in positive.named_parameters() if not name.startswith("attention")]
    scores = reference.branch_scores(leaves, positive.weight, positive.bias, head.pool_size)  # |Z|
    exact = copy.deepcopy(head).double()
    matrix, offset = positive.attention_weight, positive.attention_bias
    with torch.no_grad():
        assert offset is not None and exact.attention_bias is not None
        y, z = exact.forward_branches([x.detach().double() for x in features])
        g = reference.gates(z, exact.attention_weight, exact.attention_bias)
        s = torch.einsum("ij,bjk->bik", matrix, scores) + offset[:, None]
        t = 1 + s + (g * s).sum(1, keepdim=True)
        found = {"y": (g * (scores + z.abs() * t)).sum(1), "branches": scores.detach()}
        dz = torch.zeros_like(scores) if up[1] is None else up[1].clone()
        if up[0] is not None:
            ds = up[0][:, None] * g * (scores + found["y"][:, None] + (z - y[:, None]).abs() * t)
            dz += up[0][:, None] * g * t + torch.einsum("li,blk->bik", matrix, ds)
            found |= {"attention_weight": torch.einsum("bik,bjk->ij", ds, scores), "attention_bias": ds.sum((0, 2))}
    return found | {name: grad for (name, _), grad in zip(named, torch.autograd.grad(scores, [x for _, x in named], dz), strict=True)}


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None, magnitude: Tensor | None = None) -> float:
    """Raises AssertionError with the worst element unless `actual` is within the table's row for its dtype of `expected`.

    `magnitude` (by default the largest |expected|) is what the row's `sums` is measured beside; a `tolerance` replaces the row
    by that share of the magnitude. NaN must meet NaN and infinities their own sign. Returns the worst share of the magnitude.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    row = TOLERANCE[actual.dtype] if tolerance is None else Tolerance(0.0, tolerance)
    info = torch.finfo(actual.dtype)
    a, e = actual.detach().double(), expected.detach().double()
    if magnitude is None:
        finite = e[e.isfinite()].abs()
        magnitude = finite.max() if finite.numel() else e.new_zeros(())
    same = (a == e) | (a.isnan() & e.isnan())
    excess = ((a - e).abs() - row.rounding * e.abs() - info.smallest_normal * info.eps).clamp_min(0)
    share = torch.where(same | (excess == 0), 0.0, excess / magnitude).nan_to_num(nan=float("inf"))
    worst = int(share.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), tuple(share.shape)))
    value = float(share.flatten()[worst])
    what = f"{name}{list(place)}: {a[place].item()!r}, expected {e[place].item()!r}"
    assert value <= row.sums, f"{what}, an error of {value:.2e} of the magnitude beyond its rounding, allowed {row.sums:.1e}"
    return value


def assert_same_bits(name: str, actual: Tensor, expected: Tensor) -> None:
    """Raises AssertionError with the first element that differs in any bit (so -0 is not 0); NaN of any kind meets NaN."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    a, e = actual.detach().contiguous(), expected.detach().contiguous()
    differ = ((a.view(whole) != e.view(whole)) & ~(a.isnan() & e.isnan())).nonzero()
    place = tuple(differ[0].tolist()) if len(differ) else ()
    assert not len(differ), f"{name}{list(place)}: {a[place].item()!r}, expected {e[place].item()!r}; {len(differ)} of {a.numel()} elements differ"


class Counted(TorchDispatchMode):
    """Inside it, `operators` lists every operator that is called, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(function)
        return function(*args, **(kwargs or {}))
