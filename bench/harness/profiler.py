"""What torch.profiler says of a call: kernels on a GPU, operators on a CPU, with the operators that they ran in."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .clock import synchronize

RANGES = ("Optimizer.", "ProfilerStep", "## Call ", "Torch-Compiled Region")
"""Beginnings of names of ranges, which the profiler repeats on the GPU's timeline beside the kernels that lie in them."""


RUNTIME = re.compile(r"(cuda|cu|hip)[A-Z]")
"""Calls of the GPU's runtime and driver. They number themselves, as operators do: one that runs in no operator would be given the kernels of the operator
that has its number by chance."""


def profiled(call: Callable[[int], Any], device: torch.device, calls: int = 1) -> list[Any]:
    """The profiler's events of so many calls."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device.type == "cuda")
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(calls):
            call(0)
        synchronize(device)
    return list(profile.events())


def device_events(events: Sequence[Any]) -> list[Any]:
    """Kernels, copies and fills on the GPU, without the ranges around them."""
    on_device = (event for event in events if event.device_type == torch.autograd.DeviceType.CUDA)
    return [event for event in on_device if not getattr(event, "is_user_annotation", False) and not event.name.startswith(RANGES)]


def kernel_count(call: Callable[[int], Any], device: torch.device) -> int | None:
    """How many kernels, copies and fills one call launches on a GPU; None where the profiler gives no answer."""
    try:
        return len(device_events(profiled(call, device))) or None
    except (RuntimeError, AssertionError):
        return None


def entries(events: Sequence[Any], device: torch.device, calls: int) -> list[dict[str, Any]]:
    """Where the time of a call went, the largest share first: name, operators, times a call that it ran, microseconds a call.

    A name is a kernel's on a GPU, an operator's on a CPU, whose time is its own without that of the operators in it. operators: those it ran in,
    the innermost first; none where the profiler knows none.
    """
    sums: dict[tuple[str, tuple[str, ...]], list[float]] = {}
    for name, operators, times, us in _kernels(events) if device.type == "cuda" else _operators(events):
        total = sums.setdefault((name, operators), [0, 0.0])
        total[0] += times
        total[1] += us
    found = [
        {"name": name, "operators": list(operators), "calls": round(times / calls, 3), "us": round(us / calls, 3)}
        for (name, operators), (times, us) in sums.items()
    ]
    return sorted((entry for entry in found if entry["us"] > 0), key=lambda entry: -entry["us"])


def _operators(events: Sequence[Any]) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
    for event in events:
        chain = _chain(event)
        yield chain[0], chain, 1, event.self_cpu_time_total


def _kernels(events: Sequence[Any]) -> Iterator[tuple[str, tuple[str, ...], int, float]]:
    """Every kernel once: those that an operator launched, then what remains of each name."""
    rest: dict[str, list[float]] = {}
    for event in device_events(events):
        total = rest.setdefault(event.name, [0, 0.0])
        total[0] += 1
        total[1] += event.time_range.elapsed_us()
    for event in events:
        launches = event.device_type == torch.autograd.DeviceType.CPU and not RUNTIME.match(event.name)
        for kernel in event.kernels if launches else ():
            if rest.get(kernel.name, (0,))[0] > 0:
                rest[kernel.name][0] -= 1
                rest[kernel.name][1] -= kernel.duration
                yield kernel.name, _chain(event), 1, kernel.duration
    for name, (times, us) in rest.items():
        if times > 0:
            yield name, (), int(times), us


def _chain(event: Any) -> tuple[str, ...]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return tuple(names)
