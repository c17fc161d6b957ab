"""For tests: canonical cases, seeded inputs, one tolerance table, a comparator that names the worst element."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .modules import InterflowHead
from .reference import ATTENTIONS

__all__ = ["ATTENTIONS", "TOLERANCE", "HeadCase", "assert_close", "gradients", "head_inputs", "in_layout"]

TOLERANCE = {
    # Largest error beside the largest expected value of its tensor, against fp64 on the same (rounded) inputs.
    # dtype: tolerance         worst seen over the test suite (outputs and every gradient)
    torch.float64: 1e-12,  #   2.9e-13
    torch.float32: 1e-5,  #    2.6e-6
    torch.float16: 2e-3,  #    4.9e-4, half an ulp
    torch.bfloat16: 1.2e-2,  # 3.9e-3, half an ulp
}

LAYOUTS = ("contiguous", "channels_last", "cropped", "permuted", "expanded")


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


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float | None = None, floor: float = 0.0) -> float:
    """Raises AssertionError with the worst element unless |actual - expected| <= tolerance * max|expected| + floor everywhere.

    NaN must meet NaN and infinities their own sign. `tolerance` defaults to the table's row for actual.dtype; `floor` is for
    sums that cancel: an absolute error that plain PyTorch makes in the same dtype. Returns the worst error.
    """
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return 0.0
    limit = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    a, e = actual.detach().double(), expected.detach().double()
    same = (a == e) | (a.isnan() & e.isnan())
    finite = e[e.isfinite()].abs()
    scale = finite.max().clamp_min(1e-30) if finite.numel() else torch.tensor(1.0)
    error = torch.where(same, 0.0, ((a - e).abs() - floor).clamp_min(0) / scale).nan_to_num(nan=float("inf"))
    worst = int(error.argmax())
    place = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), tuple(error.shape)))
    value = float(error.flatten()[worst])
    assert value <= limit, f"{name}{list(place)}: {a[place].item()!r}, expected {e[place].item()!r}, error {value:.2e} of the largest, allowed {limit:.1e}"
    return value
