"""`python -m interflow_kernels.triton.tune`: measures sizes of tiles on this GPU and writes a table that INTERFLOW_TRITON_TILES may name.

Nothing tunes by itself: without a table the rule of `tiles` holds. Sizes are part of the order of sums: under another table the last bits of
results may change, under the same table they never do, and an image's bits do not depend on its batch under any table.

For each class of shapes, the rule and a few neighbours of it (a size or two doubled or halved) are tried. Candidates that spill
registers, do not compile, or miss the fp64 reference by more than `testing.TOLERANCE` are passed over; of the rest the kernel's own launch is
timed with `triton.testing.do_bench` (median), at every batch, and the least geometric mean wins. An entry is written where it gains 3 %.
"""

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__, backend, reference
from .._tap_format import is_channels_last
from ..modules import FusedInterflowHead
from ..testing import EndCase, HeadCase, TapCase, assert_close, end_inputs, gradients, head_inputs, in_layout, magnitudes, tap_inputs
from . import registration, tiles

VGG16 = ("128x112x112", "256x56x56", "512x28x28", "512x14x14")
GAIN = 1.03  # below it a difference may be noise, and the rule stays
LAYOUTS = ("channels_last", "contiguous")

Clock = Callable[[Any], float]
"""A `common.launch.Launch` -> its time, in ms."""


@dataclass(frozen=True)
class Problem:
    """A call at one batch, and what it must give."""

    name: str
    kernels: tuple[str, ...]  # whose sizes it tunes
    run: Callable[[], dict[str, Tensor]]
    expected: Mapping[str, Tensor]  # fp64
    magnitude: Mapping[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """A class of shapes: the entry that won, the rule's own where nothing gained, with the speed-up over the rule at each batch."""

    key: str
    sizes: tiles.Sizes
    gains: tuple[float, ...]
    tried: int
    passed_over: tuple[str, ...]  # each with the reason

    @property
    def gain(self) -> float:
        return _mean(self.gains)


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


# --- problems -------------------------------------------------------------------------------------------------------------
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tap_problem(batch: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, max_pool: bool, device: str) -> Problem:
    """A tap [B, C, H, W], forward and backward."""
    from .stage_tap.backward import stage_tap_backward
    from .stage_tap.forward import stage_tap

    channels, height, width = shape
    u, shift = tap_inputs(TapCase((batch, *shape), dtype, layout, max_pool))
    assert shift is not None
    u, shift = in_layout(u.to(device), layout), shift.to(device)
    dm = torch.randn(batch, channels, height // 2, width // 2, device=device).to(dtype) if max_pool else None
    dp = torch.randn(batch, channels, device=device)

    def run() -> dict[str, Tensor]:
        m, p, mask = stage_tap(u, shift, max_pool, True)
        du, dshift = stage_tap_backward(dm, dp, mask, u, max_pool, is_channels_last(u), True)
        return ({"m": m} if max_pool else {}) | {"p": p, "du": du, "dshift": dshift}

    leaf = (u + shift.to(dtype)[:, None, None]).double().requires_grad_()
    m, p = reference.stage_tap(leaf, None, max_pool)
    pairs = [(p, dp)] if m is None or dm is None else [(m, dm), (p, dp)]
    outputs = [out for out, _ in pairs]
    (du,) = torch.autograd.grad(outputs, leaf, [g.double() for _, g in pairs], retain_graph=True)
    (size,) = torch.autograd.grad(outputs, leaf, [g.double().abs() for _, g in pairs])
    expected = {"p": p.detach(), "du": du, "dshift": du.sum((0, 2, 3))}
    magnitude = {"p": p.detach(), "du": size, "dshift": size.sum((0, 2, 3))}
    if m is not None:
        expected["m"] = magnitude["m"] = m.detach()
    stem = "tap_pixels" if layout == "channels_last" else "tap_planes"
    name = f"tap {channels}x{height}x{width} {_name(dtype)} {layout} {'max-pool' if max_pool else 'mean'} B={batch}"
    return Problem(name, (stem, f"{stem}_backward"), run, expected, magnitude)


def end_problem(batch: int, shape: tuple[int, int, int], dtype: torch.dtype, layout: str, device: str) -> Problem:
    """A stage end [B, C, H, W] with a residual, forward and backward."""
    from .stage_end.backward import stage_end_backward
    from .stage_end.forward import stage_end

    case = EndCase((batch, *shape), dtype, layout, residual=layout)
    u, shift, residual = (None if t is None else in_layout(t.to(device), layout) if t.dim() == 4 else t.to(device) for t in end_inputs(case))
    assert u is not None
    dv, dp = torch.randn(u.shape, device=device).to(dtype), torch.randn(batch, shape[0], device=device)

    def run() -> dict[str, Tensor]:
        v, p = stage_end(u, shift, residual, "relu")
        du, dshift = stage_end_backward(dv, dp, v, u, is_channels_last(u), True)
        return {"v": v, "p": p, "du": du, "dshift": dshift}

    v, _ = reference.stage_end(u, shift, residual, "relu")
    mean = v.double().mean((2, 3))
    gradients_of = [torch.where(v <= 0, 0.0, f(dv.double()) + f(dp.double())[:, :, None, None] / (shape[1] * shape[2])) for f in (lambda g: g, torch.abs)]
    expected, magnitude = ({"v": v.double(), "p": mean, "du": d, "dshift": d.sum((0, 2, 3))} for d in gradients_of)
    stem = "end_pixels" if layout == "channels_last" else "end_planes"
    name = f"end {'x'.join(map(str, shape))} {_name(dtype)} {layout} B={batch}"
    return Problem(name, (stem, f"{stem}_backward"), run, expected, magnitude)


def head_problem(batch: int, case: HeadCase, kernels: tuple[str, ...], pooled: bool, device: str) -> Problem:
    """A head on maps, or on means as a tap gives them, forward and backward."""
    case = replace(case, batch=batch)
    plain = case.head()
    features = [in_layout(x.to(device), case.layout) for x in head_inputs(case)]
    if pooled:
        features = [x.mean((2, 3)) for x in features]
    fused = FusedInterflowHead.from_eager(copy.deepcopy(plain)).to(device)
    plain = plain.to(device)
    dy = torch.randn(case.batch, case.classes, device=device).to(case.dtype)

    def results(head: Any, xs: Sequence[Tensor], up: Tensor) -> dict[str, Tensor]:
        outputs, grads = gradients(head, xs, up, None)
        return outputs | {name: g for name, g in grads.items() if g is not None}

    with backend("eager"):
        expected = results(copy.deepcopy(plain).double(), [x.double() for x in features], dy.double())
        magnitude = magnitudes(plain, features, dy, None)
    maps = "+".join("x".join(map(str, x.shape[1:])) for x in features)
    name = f"head {maps} K={case.classes} {case.attention} {_name(case.dtype)} {case.layout} B={case.batch}"
    return Problem(name, kernels, lambda: results(fused, features, dy), expected, magnitude)


Made = Callable[[int], Problem]


def cases(shapes: Sequence[tuple[int, int, int]], classes: Sequence[int], dtypes: Sequence[torch.dtype], device: str) -> Iterator[Made]:
    """For each class of shapes of a network's stages, what makes its problem at a batch."""
    for dtype in dtypes:
        for layout in LAYOUTS:
            for shape in dict.fromkeys(shapes):
                for max_pool in (True, False):
                    yield partial(tap_problem, shape=shape, dtype=dtype, layout=layout, max_pool=max_pool, device=device)
                yield partial(end_problem, shape=shape, dtype=dtype, layout=layout, device=device)
                case = HeadCase(maps=(shape,), attention="hard", attention_bias=False, layout=layout, dtype=dtype)
                yield partial(head_problem, case=case, kernels=("head_pool",), pooled=False, device=device)
        means = tuple((channels, 1, 1) for channels, _, _ in shapes)
        for k in classes:
            for attention, kernels in (("nxn", ("head_tail", "head_gradients")), ("gated", ("head_tail", "head_scores"))):
                case = HeadCase(maps=means, classes=k, attention=attention, dtype=dtype)
                yield partial(head_problem, case=case, kernels=kernels, pooled=True, device=device)


# --- candidates -----------------------------------------------------------------------------------------------------------
def candidates(key: str, rule: tiles.Sizes) -> list[dict[str, int]]:
    """Neighbours of the rule that a table may hold: a size doubled or halved, alone or with the warps, or rows for columns; stages one up or down."""
    sizes = [name for name in rule if name not in ("num_warps", "num_stages")]
    moves: list[dict[str, bool]] = [{name: up} for name in (*sizes, "num_warps") for up in (True, False)]
    moves += [{name: up, "num_warps": up} for name in sizes if name != "part" for up in (True, False)]
    if "rows" in rule:
        moves += [{"rows": up, "cols": not up} for up in (True, False)]
    else:
        moves += [{"num_stages": up} for up in (True, False)]
    found = []
    for move in moves:
        entry = dict(rule)
        for name, up in move.items():
            entry[name] = entry[name] + (1 if up else -1) if name == "num_stages" else entry[name] * 2 if up else entry[name] // 2
        if tiles.mistake(key, entry) is None and entry not in found:
            found.append(entry)
    return found


# --- measuring ------------------------------------------------------------------------------------------------------------
class Unfit(Exception):
    """Why a candidate is passed over."""


@contextmanager
def _poisoned() -> Iterator[None]:
    """Inside it new tensors begin as NaN: an output that is not written is seen."""
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def launched(problem: Problem, kernel: str, entries: tiles.Table) -> Any:
    """The kernel's launch in a run of the problem under a table; its results are checked. Raises Unfit."""
    from .common.launch import noted

    with tiles.replaced(entries), noted() as launches, _poisoned():
        outputs = problem.run()
    for name, expected in problem.expected.items():
        try:
            assert_close(name, outputs[name], expected, magnitude=problem.magnitude[name])
        except AssertionError as error:
            raise Unfit(f"disagrees with the reference: {error}") from None
    return next(launch for launch in launches if launch.kernel.__name__ == kernel)


def default_spills(launch: Any) -> int:
    return int(getattr(launch.again(), "n_spills", 0) or 0)


def default_clock(launch: Any) -> float:
    from triton.testing import do_bench

    return float(do_bench(launch.again, return_mode="median"))


def tuned(problems: Sequence[Problem], key: str, rule: tiles.Sizes, clock: Clock, spills: Callable[[Any], int]) -> Outcome:
    """The best entry for the class of one shape at several batches."""
    kernel = key.split(" ")[0]
    base_launches = [launched(p, kernel, {}) for p in problems]
    base = [clock(launch) for launch in base_launches]
    seen = {(launch.constants, launch.warps, launch.stages) for launch in base_launches}
    best, gains, reasons, tried = rule, (1.0,) * len(problems), [], 0
    for entry in candidates(key, rule):
        try:
            launches = [launched(p, kernel, {key: entry}) for p in problems]
            if (launches[0].constants, launches[0].warps, launches[0].stages) in seen:
                continue  # clamped to a launch that was timed already
            seen.add((launches[0].constants, launches[0].warps, launches[0].stages))
            spilled = spills(launches[0])
            if spilled:
                raise Unfit(f"spills {spilled}")
            times = [clock(launch) for launch in launches]
        except Unfit as error:
            reasons.append(f"{entry}: {error}")
            continue
        except Exception as error:  # the compiler's, of any kind: too much shared memory, too many registers
            reasons.append(f"{entry}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        tried += 1
        found = tuple(b / t for b, t in zip(base, times, strict=True))
        if _mean(found) > max(GAIN, _mean(gains)):
            best, gains = entry, found
    return Outcome(key, best, gains, tried, tuple(reasons))


def tune(
    made: Iterable[Made],
    batches: Sequence[int],
    clock: Clock = default_clock,
    spills: Callable[[Any], int] = default_spills,
    say: Callable[[str], None] = print,
    verbose: bool = False,
) -> dict[str, dict[str, int]]:
    """The table: an entry for each class where one gains over the rule. The first shape of a class decides."""
    entries: dict[str, dict[str, int]] = {}
    done: set[str] = set()
    for make in made:
        problems = [make(batch) for batch in batches]
        with tiles.replaced({}) as asked:
            problems[0].run()
        for key, rule in asked.items():
            if key in done or key.split(" ")[0] not in problems[0].kernels:
                continue
            outcome = tuned(problems, key, rule, clock, spills)
            done.add(key)
            what = "the rule stays"
            if outcome.gain > 1:
                entries[outcome.key] = dict(outcome.sizes)
                each = ", ".join(f"B={b} {g:.2f}x" for b, g in zip(batches, outcome.gains, strict=True))
                what = f"{outcome.gain:.2f}x ({each}): " + " ".join(f"{name}={size}" for name, size in outcome.sizes.items())
            say(f"{outcome.key}: {what}; {outcome.tried} timed, {len(outcome.passed_over)} passed over")
            if verbose:
                for reason in outcome.passed_over:
                    say(f"  {reason}")
    return entries


def environment(device: str, batches: Sequence[int]) -> dict[str, Any]:
    from ..info import triton_version

    module = getattr(torch, device)
    return {
        "gpu": module.get_device_name(),
        "torch": str(torch.__version__),
        "triton": triton_version(),
        "interflow_kernels": __version__,
        "date": date.today().isoformat(),
        "batches": list(batches),
    }


def text_of(entries: tiles.Table, made_on: Mapping[str, Any]) -> str:
    """The file's text: an entry a line."""
    lines = ",\n".join(f"    {json.dumps(key)}: {json.dumps(dict(sizes))}" for key, sizes in entries.items())
    body = f"{{\n{lines}\n  }}" if lines else "{}"
    return f'{{\n  "environment": {json.dumps(dict(made_on))},\n  "tiles": {body}\n}}\n'


# --- the command ----------------------------------------------------------------------------------------------------------
def _shape(text: str) -> tuple[int, int, int]:
    parts = text.split("x")
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"a shape is CxHxW, as 128x112x112, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _device() -> tuple[str, str | None]:
    """The GPU's device type, or why there is none to measure on."""
    device = next((name for name in ("cuda", "xpu") if getattr(torch, name).is_available()), None)
    if device is None:
        return "", "torch sees none"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return device, "TRITON_INTERPRET=1 runs the kernels on the CPU; unset it"
    return device, registration.reason_against(device)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m interflow_kernels.triton.tune", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", default="interflow_tiles.json", metavar="FILE", help="default %(default)s")
    parser.add_argument("--batch", nargs="+", type=_positive, default=[8, 32], metavar="B", help="default 8 32; an entry serves every batch")
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[_shape(s) for s in VGG16], metavar="CxHxW", help="a network's stages; default VGG-16's")
    parser.add_argument("--classes", nargs="+", type=_positive, default=[1000], metavar="K", help="default 1000")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16", "float16"), default=["bfloat16"], help="default bfloat16")
    parser.add_argument("--verbose", action="store_true", help="also says why candidates were passed over")
    chosen = parser.parse_args(arguments)
    if len(chosen.shapes) > 16:
        parser.error("--shapes: a head has at most 16 stages")
    device, reason = _device()
    if reason is not None:
        print(f"The tuner measures on a GPU and cannot run here: {reason}.", file=sys.stderr)
        return 2
    out = Path(chosen.out)
    if not out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {str(out.resolve().parent)!r}")
    torch.manual_seed(0)
    with backend("triton"):
        made = cases(chosen.shapes, chosen.classes, [getattr(torch, name) for name in chosen.dtypes], device)
        entries = tune(made, chosen.batch, verbose=chosen.verbose)
    out.write_text(text_of(entries, environment(device, chosen.batch)), encoding="utf-8")
    print(f"{len(entries)} entries in {chosen.out}; {tiles.VARIABLE}={chosen.out} puts them to use. Results may differ from the rule's in their last bits.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
