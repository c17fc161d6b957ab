"""Predicts every row of the GPU targets for an H100 and an H200, sets beside it what an H200 measured, and writes docs/gpu-model.md.

    make gpu-model                                    # writes the page
    PYTHONPATH=bench python -m gpu_model.page --check  # exit status 1 where the page is not what this makes

The model is model.py; instruction counts are those of counts.json; measurements are read from the committed results
(measured.py). The model's assumptions are not fitted to them.
"""

import argparse
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpu_model import model
from gpu_model.measured import Found, Measured, committed
from gpu_model.model import GPUS, Gpu

PAGE = Path(__file__).resolve().parents[2] / "docs/gpu-model.md"
CONVOLUTIONS = 450e6  # FLOP a microsecond: what VGG-16's convolutions are assumed to reach
VGG_FLOP = 30.69e9  # of the convolutions, an image at 224 pixels
INTERIOR = 7_426_048  # outputs of convolutions inside stages, an image
WIDTH = sum(channels for channels, _ in model.VGG_STAGES)
REFUTED = 1.25
"""A prediction is refuted where the time measured is so many times as long, or as short."""


@dataclass(frozen=True)
class Row:
    """A line of the page: microseconds on each GPU, and the share of what the bytes take at a copy's rate (or another ratio) with its target.

    predicted, microseconds: of each of GPUS, the last of which was measured; measured: there, None where it was not.
    """

    number: str
    what: str
    target: str
    predicted: tuple[str, ...]
    microseconds: float
    by: str
    measured: Found | None = None
    unit: str = ""

    def ratio(self) -> float | None:
        """Time measured over time predicted."""
        return None if self.measured is None else self.measured.microseconds / self.microseconds

    def refuted(self) -> bool:
        ratio = self.ratio()
        return ratio is not None and not 1 / REFUTED <= ratio <= REFUTED


def shares(number: str, what: str, target: str, floor_bytes: float, times: list[model.Time], measured: Found | None) -> Row:
    cells = [f"{t.microseconds:.1f} us, {floor_bytes / gpu.copy / t.microseconds:.2f}" for gpu, t in zip(GPUS, times, strict=True)]
    return Row(number, what, target, tuple(cells), times[-1].microseconds, times[-1].limit, measured)


def head_rows(found: Measured) -> Iterator[Row]:
    for number, batch, target in (
        ("1", 1, "<= 8.0 us"),
        ("2", 8, ">= 0.65, <= 17.5 us"),
        ("3", 32, ">= 0.86, <= 51 us"),
        ("4", 128, ">= 0.93"),
        ("4", 256, ">= 0.95"),
    ):
        for layout in ("NHWC", "NCHW"):
            times = [model.head_time(gpu, batch, model.VGG_STAGES, 1000, layout == "NHWC") for gpu in GPUS]
            what, floor = f"head forward, 224 px, {layout}, B = {batch}, K = 1000", model.head_bytes(batch, model.VGG_STAGES, 1000)
            yield shares(number, what, target, floor, times, found.head(batch, layout == "NHWC"))
    for batch, target in ((128, "<= 8 us"), (512, ">= 0.70"), (2048, ">= 0.88")):
        times = [model.head_time(gpu, batch, model.SMALL_STAGES, 10) for gpu in GPUS]
        yield shares("5", f"head forward, 32 px, NHWC, B = {batch}, K = 10", target, model.head_bytes(batch, model.SMALL_STAGES, 10), times, None)
    own = [model.head_backward_time(gpu, 32, WIDTH, 1000) for gpu in GPUS]
    what, target = "head backward, own kernels, B = 32, K = 1000", "<= 15 us, at most 3 launches, no map's bytes"
    yield Row("6", what, target, tuple(f"{us:.1f} us" for us in own), own[-1], "latency", found.head(32, True, backward=True))


def tap_rows(found: Measured) -> Iterator[Row]:
    for number, layout, backward, target in (
        ("7", "NHWC", False, ">= 0.90"),
        ("8", "NHWC", True, ">= 0.88"),
        ("9", "NCHW", False, ">= 0.82"),
        ("9", "NCHW", True, ">= 0.82"),
    ):
        for batch in (32, 128, 256):
            times = [model.taps_time(gpu, batch, layout == "NHWC", backward) for gpu in GPUS]
            what = f"tap {'backward' if backward else 'forward, training'}, five boundaries at 224 px, {layout}, B = {batch}"
            yield shares(number, what, target, model.taps_bytes(batch), times, found.taps(batch, layout == "NHWC", backward))


def network_times(gpu: Gpu, batch: int, training: bool) -> tuple[float, float]:
    """Microseconds of VGG-16 with Interflow, and of plain VGG-16 in eager mode if eager moved its bytes at a copy's rate."""
    convolutions = batch * VGG_FLOP / CONVOLUTIONS * (3 if training else 1)
    inside = batch * INTERIOR * (8 + (8 if training else 0)) / gpu.copy  # bias 4, relu 4; backward: relu 6, bias gradient 2
    elements = sum(batch * channels * side * side for channels, side in model.VGG_BOUNDARIES)
    ours = sum(model.taps_time(gpu, batch, True, backward).microseconds for backward in ((False, True) if training else (False,)))
    ours += model.head_tail_time(WIDTH) + (model.head_backward_time(gpu, batch, WIDTH, 1000) if training else 0)
    plain = elements * (12.5 + (14.5 if training else 0)) / gpu.copy
    return convolutions + inside + ours, convolutions + inside + plain


def network_rows(found: Measured) -> Iterator[Row]:
    extra = model.head_tail_time(WIDTH)
    yield Row("11", "head on - head off where taps pool: one product", "<= 6 us", (f"{extra:.1f} us",) * len(GPUS), extra, "latency")
    for number, training, target in (("12", False, "<= 0.80"), ("13", True, "<= 0.85")):
        for batch in (32, 128):
            pairs = [network_times(gpu, batch, training) for gpu in GPUS]
            what = f"VGG-16 with Interflow against plain, eager, {'training step' if training else 'inference'}, NHWC, B = {batch}"
            cells = tuple(f"{ours:.0f} us, {ours / plain:.2f}x" for ours, plain in pairs)
            yield Row(number, what, target, cells, pairs[-1][0], "convolutions", found.network(batch, training), "x")


NOT_TIMES = (
    ("10", "Triton against CUDA", "its plan is another; not modelled"),
    ("14", "launches of the convolutional part", "counted by tests on any machine: 36 against 44 plain and 56 naive"),
    ("15", "saved bytes at boundaries", "arithmetic: 0.25 against eager's 4 bytes an element, 1/16"),
    ("16", "host time of a call", "not the GPU's; measured where the host is"),
    ("17", "bits", "held by the host emulation, for any grid, order, batch and address"),
)


def table(rows: list[Row]) -> Iterator[str]:
    predicted = " | ".join(f"{gpu.name}, predicted" for gpu in GPUS)
    yield f"| row | what | target | {predicted} | {GPUS[-1].name}, measured | measured / predicted | what decides |"
    yield "|---|---|---|" + "---|" * len(GPUS) + "---|---|---|"
    for row in rows:
        ratio = row.ratio()
        last = ("", "") if row.measured is None or ratio is None else (row.measured.cell(row.unit), f"{ratio:.2f}")
        yield f"| {row.number} | {row.what} | {row.target} | {' | '.join((*row.predicted, *last))} | {row.by} |"


WRONG = {
    "latency": "what a launch costs before and behind its bytes is more, or less, than assumed below",
    "bytes": "such a kernel does not move its bytes at the rate of a copy, or its last wave costs another time than assumed",
    "instructions": "the instructions of a round are issued at another rate",
    "convolutions": "convolutions run at another rate, or eager mode moves its bytes at another",
}
"""What a refuted row says is wrong, by what decides its prediction."""


def refuted(rows: list[Row], found: Measured) -> Iterator[str]:
    """The rows that came out otherwise, and what of the model each kind of them contradicts."""
    measured, wrong = [row for row in rows if row.measured], [row for row in rows if row.refuted()]
    yield from wrapped(
        f"Refuted is a prediction where the time measured is {REFUTED} times as long, or as short: {len(wrong)} of the {len(measured)} rows that were measured."
    )
    for by in dict.fromkeys(row.by for row in wrong):
        cases = "; ".join(f"{row.what} ({row.ratio():.2f})" for row in wrong if row.by == by)
        yield from wrapped(f"**Decided by {by}: {WRONG[by]}.** Time measured over time predicted: {cases}.")
    pairs = []
    for batch in (32, 128):
        for training in (False, True):
            plain = found.network(batch, training, "plain")
            if plain is not None:
                pairs.append((f"{'training step' if training else 'inference'}, B = {batch}", plain.microseconds, network_times(GPUS[-1], batch, training)[1]))
    if pairs:
        cases = "; ".join(f"{what}: {us:.0f} us, {us / expected:.2f} times the model's {expected:.0f}" for what, us, expected in pairs)
        yield from wrapped(
            "**Plain VGG-16.** Rows 12 and 13 let eager mode move its bytes at a copy's rate. Where plain VGG-16 takes longer than that, Interflow gains more"
            f" than predicted: {cases}."
        )
    yield from wrapped(f"**The copy.** Assumed {GPUS[-1].copy / 1e6:.1f} TB/s, measured {found.rate():.2f}, the faster of the driver's copy and a kernel's.")


def against_eager() -> Iterator[str]:
    """By bytes alone, those of eager mode's own operators."""
    yield "| row | what | target | " + " | ".join(f"{gpu.name}, at least" for gpu in GPUS) + " |"
    yield "|---|---|---|---|---|"
    for number, batch, target in (("3", 32, ">= 1.7x, 2.1x"), ("4", 128, ">= 1.3x"), ("4", 256, ">= 1.2x")):
        ratios = [model.head_bytes(batch, model.VGG_STAGES, 1000) / g.copy / model.head_time(g, batch, model.VGG_STAGES, 1000).microseconds for g in GPUS]
        yield f"| {number} | head forward, B = {batch}: eager reads the maps once | {target} | " + " | ".join(f"{r:.2f}x" for r in ratios) + " |"
    elements = 32 * sum(channels * side * side for channels, side in model.VGG_BOUNDARIES)
    for number, backward, layout, of_eager, target in (
        ("7", False, "NHWC", 14.5, ">= 6x"),
        ("8", True, "NHWC", 22.5, ">= 7x"),
        ("9", False, "NCHW", 14.5, ">= 4x"),
        ("9", True, "NCHW", 22.5, ">= 5x"),
    ):
        ratios = [elements * of_eager / g.copy / model.taps_time(g, 32, layout == "NHWC", backward).microseconds for g in GPUS]
        what = f"tap {'backward' if backward else 'forward'}, {layout}, B = 32: eager moves {of_eager} bytes an element"
        yield f"| {number} | {what} | {target} | " + " | ".join(f"{r:.1f}x" for r in ratios) + " |"


def boundaries(found: Measured) -> Iterator[str]:
    """Waves of each boundary, where a unit more than a whole number of them costs most."""
    yield "| boundary | layout | units | waves of 396 blocks | forward, share | measured | backward, share | measured | what decides |"
    yield "|---|---|---|---|---|---|---|---|---|"
    gpu = GPUS[-1]
    for channels, side in model.VGG_BOUNDARIES:
        for layout in ("NHWC", "NCHW"):
            units = model._C.tap_plan(32, channels, side, side, 2, True, layout == "NHWC").units
            forward, backward = (model.tap_time(gpu, 32, channels, side, layout == "NHWC", b) for b in (False, True))
            floor = model.tap_bytes(32, channels, side) / gpu.copy
            there = [found.tap(32, channels, side, layout == "NHWC", b) for b in (False, True)]
            seen = ["" if t is None else f"{t.share:.2f}" for t in there]
            yield (
                f"| {channels} x {side} x {side} | {layout} | {units} | {units / 396:.2f} | {floor / forward.microseconds:.2f} | {seen[0]}"
                f" | {floor / backward.microseconds:.2f} | {seen[1]} | {forward.limit} |"
            )


def wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 116, break_on_hyphens=False)
    yield ""


def page() -> str:
    copies = ", ".join(f"{gpu.copy / 1e6:.1f} TB/s for an {gpu.name}" for gpu in GPUS)
    found = committed()
    rows = [*head_rows(found), *tap_rows(found), *network_rows(found)]
    lines = [
        "# What the CUDA kernels should take, and what they take",
        "",
        *wrapped(
            "**Predicted by a model that was made before any kernel had run on a GPU.** `make gpu-model` makes this page from the launch plans, from"
            " instructions counted in machine code (sm_90a) and from the assumptions below, which are not fitted to measurements. It is here to be refuted:"
            " where the two differ the model says which part of it was wrong."
        ),
        *wrapped(
            f"**Measured on an {found.about()}** (`bench/results/nvidia-h200/`): kernels in replayed graphs on inputs that no cache holds, shares of the copy"
            " measured beside them; networks as eager calls. An empty cell was not measured."
        ),
        *wrapped(f"A prediction is a time, and the share of what the bytes alone take at the rate of a copy: {copies}."),
        *table(rows),
        "",
        "## What the measurement refuted",
        "",
        *refuted(rows, found),
        "## What the rows leave out",
        "",
        *wrapped(
            "Rows 12 and 13 take plain VGG-16 as if eager mode moved its bytes at a copy's rate, which flatters it, and convolutions at"
            f" {CONVOLUTIONS / 1e6:.0f} TFLOP/s on either GPU. Rows that are no times of the GPU's:"
        ),
        "| row | what | why it has no prediction |",
        "|---|---|---|",
        *(f"| {number} | {what} | {why} |" for number, what, why in NOT_TIMES),
        "",
        "## Against eager mode, by bytes alone",
        "",
        *wrapped(
            "If eager PyTorch moved its bytes at a copy's rate and its launches took no time. It does neither, so a measured ratio should be larger;"
            " for the head, whose eager form reads the maps once as well, launches are all that it loses."
        ),
        *against_eager(),
        "",
        "## How a launch is added up",
        "",
        *wrapped(
            "Blocks that are resident together are a wave. It takes the longest of three: its bytes at a copy's rate; its rounds of loads, one memory"
            " latency after the other; its instructions, four a clock and processor. A last wave of few blocks costs its latency. What memory loses of"
            " its rate by mixing reads and writes, or where a launch begins and ends, is not in it: shares near 1 are too high."
        ),
        f"The taps' waves on an {GPUS[-1].name} at B = 32, bf16:",
        "",
        *boundaries(found),
        "",
        "| assumed | us | what it is |",
        "|---|---|---|",
        *(f"| {name} | {value} | {what} |" for name, (value, what) in model.ASSUMED.items()),
        "",
        "| counted, sm_90a | instructions a warp and round |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in model.COUNTS.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where the page is not what this makes")
    text = page()
    if not parser.parse_args().check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        raise SystemExit(f"{PAGE.name} is not what the model makes now: make gpu-model")


if __name__ == "__main__":
    main()
