"""The parts and the calls: what each runs and for how long at most. `make gpu` runs all parts; a call is a few of them in one visit to a GPU."""

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from . import measure, smoke, suites
from .process import Command, run
from .setting import Setting, architecture


@dataclass(frozen=True)
class Part:
    """What it does, with its limit in seconds; `run` gives the number of things that went wrong."""

    says: str
    seconds: float
    run: Callable[[Setting, float], int]


def build(setting: Setting, seconds: float) -> int:
    """Builds in place for this GPU alone; nothing to do where a kit serves, or in a rehearsal."""
    if setting.kit is not None or setting.capability is None:
        setting.say(f"not built: {'the kit ' + str(setting.kit) + ' serves' if setting.kit else 'a rehearsal takes what is there'}")
        return 0
    more = {"INTERFLOW_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(setting.capability)}
    return _one(Command("build", [sys.executable, "setup.py", "build_ext", "--inplace"], seconds, setting.environment(**more)), setting)


def info(setting: Setting, seconds: float) -> int:
    return _one(Command("info", [sys.executable, "-m", "interflow_kernels.info"], seconds, setting.environment(INTERFLOW_BACKEND="auto")), setting)


def measuring(module: str, name: str = "", only: str = "", **environment: str) -> Callable[[Setting, float], int]:
    """A part whose own process measures; it ends a little before its limit by itself. name: of its results, where not the module's."""

    def part(setting: Setting, seconds: float) -> int:
        margin = min(15.0, seconds / 5)
        words = [sys.executable, "-m", f"gpu.{module}", "--device", setting.device, "--out", str(setting.out), "--budget", f"{seconds - margin:.0f}"]
        words += ["--only", setting.only or only] if setting.only or only else []
        words += ["--name", name] if name else []
        more = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"} if setting.rehearsal else {}
        kit = ["--kit", str(setting.kit)] if setting.kit is not None else []
        return _one(Command(name or module, [*words, *kit], seconds, setting.environment(**more, **environment)), setting)

    return part


def _one(command: Command, setting: Setting) -> int:
    (outcome,) = run([command], setting.say)
    if outcome.state != "ok":
        setting.say(f"{outcome.name}: {outcome.state}")
    return int(outcome.state != "ok")


PARTS: Mapping[str, Part] = {
    "build": Part("builds for this GPU, unless a kit serves", 200, build),
    "info": Part("what was built, what serves and why not something else", 30, info),
    "smoke": Part("each kernel, dtype and layout against the CPU, beyond 2^31 elements, graphs and streams; a hang gets a name", 200, smoke.smoke),
    "speed": Part("each stage forward and backward beside a copy and a read", 75, measuring("speed")),
    "blocks": Part(
        "the same at B = 32 with as many blocks as there are units, which the hardware hands out",
        45,
        measuring("speed", "blocks", "B=32", INTERFLOW_MAX_BLOCKS="0"),
    ),
    "test": Part("the tests that need a GPU, by several workers; memcheck and racecheck beside them", 200, suites.test),
    "headline": Part("VGG-16 and VGG-16-BN with Interflow against plain and naive, the most telling cell first", 200, measuring("headline")),
    "bench": Part("the other benchmarks by value, the profile of whole networks, the report", 200, measure.measure),
}

CALLS: Mapping[str, tuple[tuple[str, float], ...]] = {
    "call1": (("info", 30), ("smoke", 80), ("speed", 70), ("blocks", 45)),  # correctness and speed of each kernel
    "call2": (("test", 200),),  # the suites
    "call3": (("headline", 150), ("bench", 75)),  # what it is for, and peers
}
"""Three visits of at most 225 seconds to a GPU that is there for fifteen minutes: (part, its limit)."""


def perform(asked: tuple[tuple[str, float], ...], setting: Setting) -> int:
    """Runs parts one after the other -> 1 where anything went wrong. One that fails does not stop the next; an interrupt stops all."""
    ended = []
    for name, seconds in asked:
        if setting.say.interrupted:
            break
        setting.say(f"\n=== {name}: {PARTS[name].says}")
        start = time.perf_counter()
        try:
            wrong = PARTS[name].run(setting, seconds)
        except Exception:  # a mistake of a part takes none of the time of the others
            setting.say(f"FAILED {name}: {traceback.format_exc()}")
            wrong = 1
        ended.append((name, time.perf_counter() - start, wrong))
    if len(asked) > 1:
        setting.say("\n=== summary")
        for name, taken, wrong in ended:
            setting.say(f"{name:10} {taken:5.0f} s  {f'{wrong} wrong' if wrong else 'ok'}")
    return int(setting.say.interrupted or any(wrong for _, _, wrong in ended))
