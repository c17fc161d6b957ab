"""`make numerics`: the worst error of every operator beside that of eager PyTorch, both against fp64, on inputs that are hard to sum.

An error is counted in eps of the result's dtype times what the number is made of: the sum of the absolute values of its terms, at least the
smallest normal number. 0.5 is then the rounding of an exact result, and numbers that cancel are judged by what they are made of. Where a result that
does not fit its dtype is infinite, as the exact one rounds to, nothing is wrong; any other infinity or NaN is an error of inf.
"""

import argparse
import copy
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interflow_kernels import FusedInterflowHead, InterflowHead, stage_end, stage_tap
from interflow_kernels.testing import composed_end, composed_tap, gradients, magnitudes

PAGE = Path(__file__).resolve().parent.parent / "docs/reliability.md"
BEGIN, END = "<!-- numerics:begin -->\n", "<!-- numerics:end -->"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("random", "mixed magnitudes", "cancellation", "subnormals", "constants", "saturating")
HEADS = ("hard", "1xn", "nxn", "classwise", "gated")
OPERATORS = (*(f"head {mode}" for mode in HEADS), "pool", "stage tap", "stage end")
Named = Mapping[str, Tensor]


class Errors(NamedTuple):
    """Of one tensor: the largest error of ours and of eager's, and how many numbers were compared."""

    ours: float
    eager: float
    numbers: int


# --- inputs ---------------------------------------------------------------------------------------------------------------------
def draw(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Numbers of a kind; what is added up lies along the last dimensions."""
    info, x = torch.finfo(dtype), torch.randn(shape, dtype=torch.float64)
    if kind == "mixed magnitudes":  # in fp16 the largest products would not fit
        x = x * 2.0 ** (torch.rand(shape, dtype=torch.float64) * (40 if dtype != torch.float16 else 22) - 20)
    elif kind == "cancellation":  # neighbours that cancel but for a part in 256
        flat = x.flatten(min(2, x.dim() - 1))
        flat[..., 1::2] = -flat[..., 0::2][..., : flat[..., 1::2].shape[-1]] * (1 + flat[..., 1::2] / 256)
        x = flat.view(shape)
    elif kind == "subnormals":
        x = x * info.smallest_normal / 8
    elif kind == "constants":
        x = (0.1 + torch.rand(shape[:2] + (1,) * (len(shape) - 2), dtype=torch.float64)).expand(shape)
    elif kind == "saturating":  # half of what fp16 holds and more
        x = x.sign() * (0.5 + 0.5 * torch.rand(shape, dtype=torch.float64)) * 65504
    return x.to(dtype).contiguous()


def kinds_of(dtype: torch.dtype) -> tuple[str, ...]:
    return KINDS if dtype == torch.float16 else KINDS[:-1]


# --- errors ---------------------------------------------------------------------------------------------------------------------
def error(got: Tensor, exact: Tensor, magnitude: Tensor) -> float:
    """The largest one, in the unit of this file."""
    info = torch.finfo(got.dtype)
    rounded, value = exact.to(got.dtype), got.detach().double()
    right = (got == rounded) | (got.isnan() & rounded.isnan())
    share = (value - exact).abs() / (info.eps * magnitude.clamp_min(info.smallest_normal))
    return float(torch.where(right, share.nan_to_num(0.5, 0.5).clamp_max(0.5), share.nan_to_num(float("inf"), float("inf"))).max())


def compared(ours: Named, eager: Named, exact: Named, magnitude: Named) -> dict[str, Errors]:
    return {
        name: Errors(*(error(found[name], exact[name].detach(), magnitude[name].detach()) for found in (ours, eager)), exact[name].numel()) for name in exact
    }


# --- operators --------------------------------------------------------------------------------------------------------------------
def of_head(mode: str, kind: str, dtype: torch.dtype, scale: int) -> dict[str, Errors]:
    """y, branches and each gradient of a head on two maps; parameters are of the kind where their products still fit."""
    batch, classes, widths = 64 // scale, 64, (64, 96)
    own = "random" if kind in ("subnormals", "saturating") else kind
    plain = InterflowHead(widths, classes, mode, dtype=torch.float64)
    with torch.no_grad():
        for name, t in plain.named_parameters():
            share = sum(widths) ** -0.5 if name == "weight" or own == "mixed magnitudes" else 1.0
            t.copy_(draw(own if t.dim() > 1 else "random", tuple(t.shape), torch.float64) * share)
            if kind == "saturating":
                t.mul_(1 / 64)
    plain = plain.to(dtype)
    maps = [draw(kind, (batch, c, s, s), dtype) for c, s in zip(widths, (12, 8), strict=True)]
    up = "random" if kind == "saturating" else kind
    dy, dz = draw(up, (batch, classes), dtype), draw(up, (batch, 2, classes), dtype)

    def flat(found: tuple[dict[str, Tensor], dict[str, Tensor | None]]) -> dict[str, Tensor]:
        return found[0] | {name: g for name, g in found[1].items() if g is not None}

    exact = flat(gradients(copy.deepcopy(plain).double(), [x.double() for x in maps], dy.double(), dz.double()))
    fused = flat(gradients(FusedInterflowHead.from_eager(plain), maps, dy, dz))
    return compared(fused, flat(gradients(plain, maps, dy, dz)), exact, magnitudes(plain, maps, dy, dz))


def of_pool(kind: str, dtype: torch.dtype, scale: int) -> dict[str, Errors]:
    x = draw(kind, (16 // scale, 64, 32, 32), dtype)
    ours = torch.ops.interflow_kernels.interflow_pool([x], (1, 1))
    return compared(
        {"pooled": ours}, {"pooled": x.mean((2, 3), dtype=torch.float32)}, {"pooled": x.double().mean((2, 3))}, {"pooled": x.double().abs().mean((2, 3))}
    )


def ends(v: Tensor, activation: str, pooled: bool, dm: Tensor, dp: Tensor) -> dict[str, Tensor]:
    """p, du and dshift in fp64, of v as it came out and of the gradients of m (or of v itself) and p."""
    leaf = v.detach().double().requires_grad_()
    out = F.relu(leaf) if activation == "relu" else leaf
    p = out.mean((2, 3))
    (du,) = torch.autograd.grad([F.max_pool2d(out, 2, 2) if pooled else out, p], leaf, [dm.double(), dp.double()])
    return {"p": p.detach(), "du": du, "dshift": du.sum((0, 2, 3))}


def of_end(kind: str, dtype: torch.dtype, scale: int, pooled: bool) -> dict[str, Errors]:
    """p and the gradients of the stage tap (pooled) or the stage end, whose maps have eager's bits."""
    shape = (16 // scale, 64, 32, 32)
    u, residual = draw(kind, shape, dtype), None if pooled else draw(kind, shape, dtype)
    shift = draw("random" if kind == "saturating" else kind, (1, 64), torch.float32)[0]
    dm = draw("random" if kind == "saturating" else kind, (*shape[:2], 16, 16) if pooled else shape, dtype)
    dp = draw("random" if kind == "saturating" else kind, shape[:2], torch.float32)

    def found(fused: bool) -> tuple[Tensor, dict[str, Tensor]]:
        leaf, moved = u.detach().requires_grad_(), shift.detach().requires_grad_()
        if pooled:
            v, m = composed_tap(leaf, moved)
            m, p = stage_tap(leaf, moved, max_pool=True) if fused else (m, v.mean((2, 3), dtype=torch.float32))
        else:
            v = composed_end(leaf, moved, residual)
            m, p = stage_end(leaf, moved, residual) if fused else (v, v.mean((2, 3), dtype=torch.float32))
        assert m is not None
        du, dshift = torch.autograd.grad([m, p], [leaf, moved], [dm, dp])
        return v.detach(), {"p": p.detach(), "du": du, "dshift": dshift}

    (v, eager), (_, ours) = found(False), found(True)
    return compared(ours, eager, ends(v, "relu", pooled, dm, dp), ends(v, "relu", pooled, dm.abs(), dp.abs()))


def measured(operator: str, kind: str, dtype: torch.dtype, scale: int = 1) -> dict[str, Errors]:
    """The errors of an operator's outputs and gradients, by name; scale: by what the batch is divided."""
    torch.manual_seed(0)
    if operator == "pool":
        return of_pool(kind, dtype, scale)
    if operator.startswith("head"):
        return of_head(operator.removeprefix("head "), kind, dtype, scale)
    return of_end(kind, dtype, scale, operator == "stage tap")


# --- the page -----------------------------------------------------------------------------------------------------------------------
def number(value: float) -> str:
    return "inf" if value == float("inf") else f"{value:.2g}" if value < 100 else f"{value:.0f}"


def rows(scale: int) -> Iterator[str]:
    compared_numbers = 0
    for operator in OPERATORS:
        for dtype in DTYPES:
            cells = []
            for kind in KINDS:
                if kind not in kinds_of(dtype):
                    cells.append("")
                    continue
                found = measured(operator, kind, dtype, scale)
                compared_numbers += sum(each.numbers for each in found.values())
                cells.append(f"{number(max(e.ours for e in found.values()))} / {number(max(e.eager for e in found.values()))}")
                for name, e in found.items():
                    if e.ours > max(2 * e.eager, 1.5):
                        print(f"worse than twice eager's: {operator} {dtype} {kind} {name}: {e.ours:.3g}, eager {e.eager:.3g}")
            yield f"| {operator} | {str(dtype).removeprefix('torch.')} | {' | '.join(cells)} |"
    yield ""
    yield f"{compared_numbers:,} results were compared."


def main() -> None:
    parser = argparse.ArgumentParser(prog="make numerics", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--scale", type=int, default=1, help="divides the batches (default: %(default)s)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    given = parser.parse_args()
    where = f"{platform.machine()}, torch {torch.__version__}, CPU kernels with {torch.backends.cpu.get_cpu_capability()}"
    head = [f"Measured with `make numerics` on {where}. Each cell: ours / eager's.", ""]
    head += ["| operator | dtype | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    text = "\n".join([*head, *rows(given.scale)]) + "\n"
    print(text)
    if given.write:
        page = PAGE.read_text()
        PAGE.write_text(page[: page.index(BEGIN) + len(BEGIN)] + text + page[page.index(END) :])


if __name__ == "__main__":
    main()
