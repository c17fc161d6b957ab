"""A model of what the CUDA kernels take on a GPU, from their plans and their machine code. Nothing in it was measured on a GPU.

A launch is waves of resident blocks; a wave takes the longest of three: its bytes at the rate of a copy, its rounds of loads one memory latency after
the other, and its instructions at four a clock and processor. page.py makes a page of it.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from interflow_kernels import _C

COUNTS = json.loads(Path(__file__).with_name("counts.json").read_text())["instructions"]


@dataclass(frozen=True)
class Gpu:
    """copy: bytes a microsecond of a device copy, read and written together."""

    name: str
    copy: float
    processors: int = 132
    clocks: float = 1750.0  # a microsecond


GPUS = (Gpu("H100", 3.0e6), Gpu("H200", 4.3e6))
ASSUMED = {
    # microseconds, each to be refuted by the first measurement
    "launch": (1.5, "a kernel of a replayed graph, until its first load"),
    "memory": (0.7, "a load from DRAM that waits for nobody"),
    "l2": (0.5, "a load from L2"),
    "publish": (1.0, "barrier, fence and atomic until another block sees it"),
    "unit": (1.0, "what a tap's unit needs besides its rounds: shift, barriers, sums"),
    "reduce": (0.4, "sums of a head's unit over its threads"),
}
LAUNCH, MEMORY, L2, PUBLISH, UNIT, REDUCE = (value for value, _ in ASSUMED.values())
TAP_BLOCKS, HEAD_BLOCKS, WARPS, VECTOR_BYTES = 3, 2, 8, 16
VGG_STAGES = ((128, 112), (256, 56), (512, 28), (512, 14))  # of the head: channels, side at 224 pixels
VGG_BOUNDARIES = ((64, 224), *VGG_STAGES)
SMALL_STAGES = ((128, 16), (256, 8), (512, 4), (512, 2))  # at 32 pixels


@dataclass(frozen=True)
class Time:
    """Microseconds, and what decides: "bytes", "latency" or "issue"."""

    microseconds: float
    limit: str


def issued(gpu: Gpu, instructions: float, blocks: float) -> float:
    """Microseconds in which a processor issues so many instructions of every warp of its blocks."""
    return instructions * WARPS * blocks / (4 * gpu.clocks)


# --- stage_tap ------------------------------------------------------------------------------------------------------------
def tap_bytes(batch: int, channels: int, side: int) -> int:
    """bf16, forward or backward: u or du, m or dm, the mask of a byte a window."""
    elements, windows = batch * channels * side * side, batch * channels * (side // 2) ** 2
    return 2 * elements + 3 * windows


def tap_time(gpu: Gpu, batch: int, channels: int, side: int, nhwc: bool, backward: bool) -> Time:
    plan = _C.tap_plan(batch, channels, side, side, 2, True, nhwc)
    staged = plan.staged and not nhwc
    loop = f"tap {'backward' if backward else 'forward'} {'NHWC' if nhwc else 'NCHW'}"
    at_once, windows = (1, 1) if nhwc else (2, plan.vector // 2)  # tiles a round, windows a tile
    rounds = math.ceil(plan.part_size / (plan.lanes * windows * at_once))
    instructions = COUNTS[loop] * math.ceil(plan.part_size / (plan.lanes * windows)) / at_once
    if staged:  # one round of copies brings a whole unit; its tiles then come from shared memory, several planes in turn
        rounds = 1
        instructions *= math.ceil(plan.slab * plan.lanes / plan.threads)
    resident, each, total = TAP_BLOCKS * gpu.processors, tap_bytes(batch, channels, side) / plan.units, 0.0
    limits: list[str] = []
    for units in waves(plan.units, resident):
        issue = issued(gpu, instructions, units / gpu.processors if units == resident else math.ceil(units / gpu.processors))
        ways = {"bytes": units * each / gpu.copy, "latency": UNIT + rounds * MEMORY, "issue": issue}
        limits.append(max(ways, key=lambda way: ways[way]))
        total += max(ways.values())
    return Time(LAUNCH + total + PUBLISH, limits[0])


def waves(units: int, resident: int) -> Iterator[int]:
    while units > 0:
        yield min(units, resident)
        units -= resident


def taps_time(gpu: Gpu, batch: int, nhwc: bool, backward: bool, boundaries: Sequence[tuple[int, int]] = VGG_BOUNDARIES) -> Time:
    """All boundaries of VGG-16, one launch each."""
    each = [tap_time(gpu, batch, channels, side, nhwc, backward) for channels, side in boundaries]
    return Time(sum(t.microseconds for t in each), max(each, key=lambda t: t.microseconds).limit)


def taps_bytes(batch: int, boundaries: Sequence[tuple[int, int]] = VGG_BOUNDARIES) -> int:
    return sum(tap_bytes(batch, channels, side) for channels, side in boundaries)


# --- interflow_head ---------------------------------------------------------------------------------------------------------
def head_bytes(batch: int, stages: Sequence[tuple[int, int]], classes: int) -> int:
    """bf16: the maps, the weight once, y."""
    width = sum(channels for channels, _ in stages)
    return 2 * (sum(batch * channels * side * side for channels, side in stages) + classes * width + batch * classes)


def head_time(gpu: Gpu, batch: int, stages: Sequence[tuple[int, int]], classes: int, nhwc: bool = True) -> Time:
    def strides(channels: int, side: int) -> tuple[int, ...]:
        return (channels * side * side, 1, side * channels, channels) if nhwc else (channels * side * side, side * side, side, 1)

    width = sum(channels for channels, _ in stages)
    plan = _C.head_schedule([[c, s, s, 2, *strides(c, s), 1, 1, 0] for c, s in stages], batch, classes, 2 * classes * width, 16)
    tiles = sum(plan.tile_count(group) for group in range(plan.groups))
    resident, pools = HEAD_BLOCKS * gpu.processors, plan.tickets - tiles
    blocks = min(HEAD_BLOCKS, math.ceil(plan.tickets / gpu.processors))
    unit = MEMORY + issued(gpu, COUNTS["head pool, bf16 by 16 bytes"], blocks) + REDUCE
    product = math.ceil(width / 32 / (2 * WARPS)) * L2 + REDUCE
    early = tiles - plan.tile_count(plan.groups - 1)  # tiles of groups that others pool beside
    ways = {"bytes": head_bytes(batch, stages, classes) / gpu.copy, "latency": math.ceil(pools / resident) * unit + early / resident * product}
    limit = max(ways, key=lambda way: ways[way])
    last = math.ceil(plan.tile_count(plan.groups - 1) / resident) * product
    return Time(LAUNCH + MEMORY + max(ways.values()) + PUBLISH + L2 + last, limit)


def head_tail_time(width: int) -> float:
    """A launch of the head whose features are all pooled: one product."""
    return LAUNCH + math.ceil(width / 32 / (2 * WARPS)) * L2 + 2 * REDUCE


def head_backward_time(gpu: Gpu, batch: int, width: int, classes: int) -> float:
    """Own kernels: products, epilogue. dp goes through the classes by 512, dW through the images by 64, 8 loads of a lane at a time."""
    dp = math.ceil(classes / 512) * (L2 + 2 * L2) + REDUCE
    dw = math.ceil(batch / 64) * (L2 + 8 * L2) + 2 * classes * width / gpu.copy + REDUCE
    tiles = math.ceil(batch / 16) * math.ceil(width / 32) + math.ceil(classes / 64) * math.ceil(width / 128)
    products = math.ceil(tiles / (HEAD_BLOCKS * gpu.processors)) * max(dp, dw)
    epilogue = math.ceil(batch / 64) * L2 + 2 * L2 + PUBLISH
    return 2 * LAUNCH + products + epilogue
