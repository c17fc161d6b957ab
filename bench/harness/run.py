"""A case from plan to samples: build, check, time all providers in turns, and hand each one's samples to pytest-benchmark.

pytest-benchmark times one function a test; providers timed minutes apart on a drifting machine cannot be compared. So the
first test of a case measures all its providers interleaved, and each provider's test gets its own samples through a timer
that replays them. JSON, tables and `pytest-benchmark compare` work as usual on what was really measured.
"""

import gc
import time
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from . import copying
from .case import Case, Plan, Provider
from .clock import REPLAY, call_turn, graph_turn, host_seconds, rotation
from .gate import refuse_wrong, tensors
from .goals import Measured
from .machine import others_seconds, wait_for_quiet
from .memory import peak_bytes
from .profiler import kernel_count
from .stats import quantile

ROUNDS = (9, 150)  # at least, at most


@dataclass
class Session:
    """One run: where, and what of it is in hand. Only the last case is kept, inputs are large."""

    device: torch.device
    scale: float = 1.0  # of every case's seconds
    timed: float = 0.0  # seconds
    others: float = 0.0  # CPU seconds that other processes took meanwhile
    patience: float = 60.0  # seconds left to wait for a quiet machine, all cases together
    deadline: float | None = None  # of time.perf_counter(): no case is begun that it would cut off
    _plan: Plan | None = None
    _infos: dict[str, dict[str, Any]] = field(default_factory=dict)
    _samples: dict[str, list[float]] = field(default_factory=dict)
    _missing: dict[str, str] = field(default_factory=dict)

    def record(self, benchmark: Any, plan: Plan, provider: str) -> None:
        """Gives pytest-benchmark what `provider` took in the measured case; skips with the reason where it cannot run."""
        if plan is not self._plan:
            self._plan, self._infos, self._samples, self._missing = plan, {}, {}, {}
            if self.deadline is not None and time.perf_counter() + plan.setup + plan.seconds * self.scale > self.deadline:
                self._missing = dict.fromkeys(plan.providers, "the time budget was spent before this case")
            else:
                self._begin(plan)
        if provider in self._missing:
            pytest.skip(f"{provider}: {self._missing[provider]}")
        assert provider in self._infos, f"{plan.name}: the case was refused or failed, see its first provider"
        benchmark.group = plan.name
        benchmark.extra_info.update(self._infos[provider])
        REPLAY.load(self._samples[provider])
        benchmark.pedantic(lambda: None, rounds=len(self._samples[provider]), iterations=1)

    def _begin(self, plan: Plan) -> None:
        """Builds, checks and measures a case."""
        if self.device.type == "cuda":  # what the last case held goes back before the next one's peak is taken
            gc.collect()
            torch.cuda.empty_cache()
        try:
            case = plan.build()
            check(case)
            self._samples = self.measure(case, plan.seconds * self.scale)
            counts = counted(case, self.device)
            self._infos = {name: summary(case, self._samples, name, self.device, *counts) for name in case.providers}
            self._missing = case.missing
        except torch.OutOfMemoryError as error:
            self._missing = dict.fromkeys(plan.providers, f"the case does not fit into this GPU's memory: {str(error).splitlines()[0]}")

    def measure(self, case: Case, seconds: float) -> dict[str, list[float]]:
        """Seconds a call, one sample for each provider and round; providers take turns, the first of a round changes."""
        turns = rotation(case.sets)
        graphs = case.family == "device" and self.device.type == "cuda"
        ways = {}
        for name, provider in list(case.providers.items()):
            with provider.around():
                ways[name] = graph_turn(provider.call, case.sets, self.device) if graphs else call_turn(provider.call, turns, self.device)
        samples: dict[str, list[float]] = {name: [] for name in ways}
        names = list(ways)
        self.patience -= wait_for_quiet(min(self.patience, 5.0))
        start, others = time.perf_counter(), others_seconds()
        for number in range(ROUNDS[1]):
            if number >= ROUNDS[0] and time.perf_counter() - start > seconds:
                break
            first = number % len(names)
            for name in names[first:] + names[:first]:
                with case.providers[name].around():
                    samples[name].append(ways[name]() / case.repeats)
        took, spent = time.perf_counter() - start, (others_seconds() or 0.0) - (others or 0.0)
        self.timed, self.others = self.timed + took, self.others + spent
        case.about["others_cores"] = round(max(0.0, spent / took), 2)
        return samples


def check(case: Case) -> None:
    """Refuses (AssertionError) a case of which ours, its twin or a peer gives a wrong result."""
    if case.expected is None:
        return
    expected = tensors(case.expected())
    for name, provider in case.providers.items():
        if provider.kind in ("ours", "twin", "peer"):
            with provider.around():
                results = provider.call(0) if provider.result is None else provider.result()
            refuse_wrong(f"{case.name}: {name}", tensors(results), expected, case.tolerance, case.by_norm)


def counted(case: Case, device: torch.device) -> tuple[dict[str, int], dict[str, int]]:
    """By provider: bytes kept for backward, and on a GPU kernels a call."""
    saved, counts = {}, {}
    for name, provider in case.providers.items():
        with provider.around():
            if provider.saved is not None:
                saved[name] = provider.saved()
            if device.type == "cuda" and provider.kind != "limit":
                counts[name] = kernel_count(provider.call, device)
    return saved, {name: count for name, count in counts.items() if count}


def summary(
    case: Case, samples: dict[str, list[float]], name: str, device: torch.device, saved: dict[str, int] | None = None, kernels: dict[str, int] | None = None
) -> dict[str, Any]:
    """extra_info of one provider: quantiles, throughput, paired ratios and shares with intervals, memory, goals, the samples."""
    mine, provider = samples[name], case.providers[name]
    median = quantile(mine, 0.5)
    info: dict[str, Any] = {
        "operator": case.operator,
        "case": case.name,
        "family": case.family,
        **case.about,
        "provider": name,
        "kind": provider.kind,
        "rounds": len(mine),
        **{f"p{q}_us": _short(quantile(mine, q / 100) * 1e6) for q in (20, 50, 80)},
        "samples_us": " ".join(str(_short(1e6 * sample)) for sample in mine),
    }
    moved = provider.bytes or case.bytes
    if moved:
        info |= {"bytes": moved, "gb_per_s": _short(moved / median / 1e9)}
    if case.images and provider.kind != "limit":
        info["images_per_s"] = _short(case.images / median)
    if provider.kind != "limit":
        saved, kernels = saved or {}, kernels or {}
        kinds, limits = ({n: getattr(p, key) for n, p in case.providers.items()} for key in ("kind", "bytes"))
        measured = Measured(samples, kinds, case.bytes, limits, saved, kernels)
        info |= _comparisons(case, measured, name)
        with provider.around():
            if device.type == "cuda":
                info["host_us"] = _short(1e6 * host_seconds(provider.call, device) / case.repeats)
            if case.memory:
                info["peak_bytes"] = peak_bytes(lambda: provider.call(0), device)
        info |= {key: known[name] for key, known in (("saved_bytes", saved), ("kernels", kernels)) if name in known}
    return info


def _comparisons(case: Case, measured: Measured, name: str) -> dict[str, Any]:
    kinds = measured.kinds
    info: dict[str, Any] = {
        "speed_up": {other: _interval(measured.speed_up(name, other)) for other in kinds if kinds[other] != "limit" and other != name},
        "share": {other: _interval(measured.share(name, other)) for other in kinds if kinds[other] == "limit" and measured.limit_bytes[other]},
    }
    if kinds[name] in ("ours", "twin"):
        info |= {"best_peer": measured.best_peer(), "missing": case.missing}
        info["goals"] = [goal.judge(measured, name) for goal in case.goals.get(name, [])]
    return info


def _interval(values: tuple[float, float, float]) -> list[float]:
    return [round(v, 4) for v in values]


def _short(value: float) -> float:
    """Four significant digits and no more text than they need."""
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short


def limit_read(sets: list[list[torch.Tensor]]) -> Provider:
    """The limit of everything that reads `sets`: their bytes summed as fp32 (PyTorch's 16-bit sum is bound by arithmetic, not by memory)."""
    words = [[as_words(x) for x in tensors_] for tensors_ in sets]
    return Provider(lambda i: [x.sum() for x in words[i]], "limit", bytes=sum(x.nbytes for x in words[0]))


def limit_copy(sets: list[list[torch.Tensor]]) -> Provider:
    """The limit of everything that reads and writes: `sets` copied into memory that is there already."""
    words = [[as_words(x) for x in tensors_] for tensors_ in sets]
    into = [torch.empty_like(x) for x in words[0]]

    def call(i: int) -> None:
        for x, y in zip(words[i], into, strict=True):
            y.copy_(x)

    return Provider(call, "limit", bytes=2 * sum(x.nbytes for x in words[0]))


def device_limits(device: torch.device) -> dict[str, Provider]:
    """On a GPU: the faster copy of half a GiB, the most bytes a second that it moves, and the smallest kernel, the least time a launch takes."""
    x = torch.empty(copying.COPY_BYTES // 4, device=device).uniform_()
    y, one = torch.empty_like(x), torch.zeros(1, device=device)
    return {"copy": Provider(copying.faster_copy(x, y), "limit", bytes=2 * x.nbytes), "launch": Provider(lambda i: one.add_(1), "limit")}


def as_words(x: torch.Tensor) -> torch.Tensor:
    """The memory of a dense tensor as one row of fp32; an odd half word at the end is left out."""
    flat = x.detach().as_strided((x.numel(),), (1,))
    return flat[: flat.nbytes // 4 * 4 // flat.itemsize].view(torch.float32)
