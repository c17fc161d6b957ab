"""What the tests of accuracy share: inputs whose sums are long, exact results, and an error beside eager PyTorch's own.

Constants are the hard inputs: every addition of a long sum of equal numbers rounds the same way, so errors add up. Exact results come from
NumPy's longdouble, for a map of constants from the constants themselves.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from interflow_kernels import reference

LINEAR = ("hard", "1xn", "nxn", "classwise")


def error(actual: Tensor, exact: np.ndarray) -> tuple[float, str]:
    """The largest error beside the largest exact number, and where and what it is."""
    wrong = np.abs(actual.detach().double().numpy().astype(np.longdouble) - exact)
    worst = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return float(wrong[worst] / np.abs(exact).max()), f"[{', '.join(map(str, worst))}]: {actual[worst].item()!r}, exactly {float(exact[worst])!r}"


def assert_no_worse(name: str, actual: Tensor, eager: Tensor, exact: np.ndarray, most: float | None = None) -> None:
    """error <= max(2 * eager's error, 1.5 * eps), and <= most * eps; errors are relative to the largest exact number."""
    eps = torch.finfo(actual.dtype).eps
    (ours, worst), (theirs, _) = error(actual, exact), error(eager, exact)
    assert ours <= max(2 * theirs, 1.5 * eps), f"{name}{worst}, an error of {ours:.1e} where eager's is {theirs:.1e}"
    assert most is None or ours <= most * eps, f"{name}{worst}, an error of {ours / eps:.1f} eps, allowed {most}"


def longdouble(t: Tensor) -> np.ndarray:
    return t.detach().double().numpy().astype(np.longdouble)


# --- maps -------------------------------------------------------------------------------------------------------------------
def map_of(kind: str, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    """[1, C, H, W]: "constant" has a constant for each channel, "random" numbers from 0 to 1."""
    if kind == "constant":
        return (0.1 + torch.rand(1, channels, 1, 1, dtype=torch.float64)).to(dtype).expand(1, channels, height, width).contiguous()
    return torch.rand(1, channels, height, width, dtype=torch.float64).to(dtype)


def exact_means(kind: str, x: Tensor, pool_size: tuple[int, int]) -> np.ndarray:
    """[1, C * Sh * Sw], each adaptive window's mean."""
    (height, width), (rows, cols) = x.shape[2:], pool_size
    if kind == "constant":
        return longdouble(x[:, :, :1, :1].expand(-1, -1, rows, cols).flatten(1))
    means = np.empty((1, x.shape[1], rows, cols), np.longdouble)
    for i in range(rows):
        for j in range(cols):
            window = x[:, :, i * height // rows : -(-(i + 1) * height // rows), j * width // cols : -(-(j + 1) * width // cols)]
            means[:, :, i, j] = longdouble(window).mean((2, 3))
    return means.reshape(1, -1)


# --- products ---------------------------------------------------------------------------------------------------------------
class Products(NamedTuple):
    """A head on pooled features, and the gradients of its outputs."""

    pooled: tuple[Tensor, ...]  # n of [B, D_i]
    weight: Tensor  # [K, D]
    bias: Tensor  # [n, K]
    attention_weight: Tensor
    attention_bias: Tensor | None
    dy: Tensor  # [B, K]
    dbranches: Tensor | None  # [B, n, K]

    def leaves(self) -> dict[str, Tensor]:
        named = {f"features[{i}]": p for i, p in enumerate(self.pooled)}
        named |= {"weight": self.weight, "bias": self.bias, "attention_weight": self.attention_weight}
        return named | ({} if self.attention_bias is None else {"attention_bias": self.attention_bias})

    def to(self, target: torch.device | str | torch.dtype) -> "Products":
        """On another device, or in another dtype."""
        return Products(*(None if t is None else t.to(target) if isinstance(t, Tensor) else tuple(p.to(target) for p in t) for t in self))


def products(kind: str, attention: str, batch: int, widths: tuple[int, ...], classes: int, dtype: torch.dtype, branches: bool) -> Products:
    """Equal images ("constant", each number of a tensor's last dimension drawn from 0.5 to 1.5), or numbers of both signs."""
    n, k = len(widths), classes

    def draw(*shape: int) -> Tensor:
        if kind == "constant":
            return (0.5 + torch.rand(1, *shape[1:], dtype=torch.float64)).to(dtype).expand(shape).contiguous()
        return torch.randn(*shape, dtype=torch.float64).to(dtype)

    shape = {"nxn": (n, n), "gated": (n, n), "classwise": (n, k)}.get(attention, (n,))
    offset = {"hard": None, "1xn": (1,), "classwise": (k,)}.get(attention, (n,))
    pooled = tuple(draw(batch, d) for d in widths)
    weight = draw(k, sum(widths)) if kind == "random" else (0.5 + torch.rand(k, 1, dtype=torch.float64)).to(dtype).expand(k, sum(widths)).contiguous()
    if kind == "constant":
        pooled = tuple(p[:, :1].expand(p.shape).contiguous() for p in pooled)
    return Products(
        pooled, weight, draw(n, k), draw(*shape), None if offset is None else draw(*offset), draw(batch, k), draw(batch, n, k) if branches else None
    )


def outputs_and_gradients(P: Products, attention: str, head) -> dict[str, Tensor]:
    """y, branches and each gradient by name. head: called as reference.interflow_head."""
    leaves = {name: t.detach().requires_grad_() for name, t in P.leaves().items()}
    pooled = [leaves[f"features[{i}]"] for i in range(len(P.pooled))]
    y, z = head(pooled, leaves["weight"], leaves["bias"], leaves["attention_weight"], leaves.get("attention_bias"), attention, (1, 1))
    pairs = [(y, P.dy)] + ([] if P.dbranches is None else [(z, P.dbranches)])
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs])
    return {"y": y, "branches": z} | dict(zip(leaves, grads, strict=True))


def exact_products(P: Products, attention: str) -> Mapping[str, np.ndarray]:
    """What `outputs_and_gradients` gives: in longdouble for the linear modes, by the reference in fp64 for "gated" (of which fp32 is judged)."""
    if attention not in LINEAR:
        return {name: longdouble(t) for name, t in outputs_and_gradients(P.to(torch.float64), attention, reference.interflow_head).items()}
    p, w, b, aw, dy = [longdouble(t) for t in P.pooled], longdouble(P.weight), longdouble(P.bias), longdouble(P.attention_weight), longdouble(P.dy)
    n, k = b.shape
    columns = np.split(w, np.cumsum([x.shape[1] for x in p])[:-1], axis=1)
    z = np.stack([x @ c.T + o for x, c, o in zip(p, columns, b, strict=True)], 1)
    a = aw if attention == "classwise" else np.repeat((aw.sum(0) if attention == "nxn" else aw)[:, None], k, 1)
    dz = a[None] * dy[:, None] + (0 if P.dbranches is None else longdouble(P.dbranches))
    da = (dy[:, None] * z).sum(0)
    found = {"y": (a * z).sum(1), "branches": z, "bias": dz.sum(0)}
    found["weight"] = np.concatenate([dz[:, i].T @ p[i] for i in range(n)], 1)
    found |= {f"features[{i}]": dz[:, i] @ columns[i] for i in range(n)}
    found["attention_weight"] = da if attention == "classwise" else np.tile(da.sum(1), (n, 1)) if attention == "nxn" else da.sum(1)
    if P.attention_bias is not None:
        c = longdouble(P.attention_bias)
        found["y"] = found["y"] + (c.sum() if attention == "nxn" else c)
        found["attention_bias"] = dy.sum(0) if attention == "classwise" else np.full(c.shape, dy.sum())
    return found


# --- the stage tap ------------------------------------------------------------------------------------------------------------
def composed_tap(u: Tensor, shift: Tensor, max_pool: bool) -> tuple[Tensor | None, Tensor]:
    v = F.relu(u + shift[:, None, None])
    return F.max_pool2d(v, 2, 2) if max_pool else None, v.mean((2, 3))
