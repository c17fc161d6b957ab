"""The part bench: the rest of the benchmarks by value, the profile of whole networks, and one report of all of them. With `full`: every case, hours."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process import Command, Outcome, run
from .setting import Setting

FULL = 24 * 3600.0  # seconds, instead of a budget
GRACE = 25.0  # seconds after its budget for what a program has begun
REPORT = 20.0  # seconds
LEAST = 12.0  # seconds, of which most are spent on beginning
STEMS = ("bench_stage_tap", "bench_head", "bench_train_step", "bench_triton")
BUDGETS = {"bench_stage_tap": 30.0, "bench_head": 35.0, "profile": 20.0, "bench_train_step": 30.0, "bench_triton": 20.0}
"""Seconds of 200, in the order of what they tell."""


@dataclass(frozen=True)
class Program:
    """What measures, and the JSON of pytest-benchmark that it leaves, if any."""

    name: str
    words: Sequence[str]
    results: Path | None = None


def programs(setting: Setting) -> list[Program]:
    """In the order they run. A rehearsal measures one case of each on the CPU."""
    chosen = ["--case", setting.only] if setting.only else []
    made = {}
    for stem in STEMS:
        results = setting.out / f"{stem}.json"
        options = ["-q", "--disable-warnings", "-p", "no:cacheprovider", "-rs", "--benchmark-columns=median,iqr,rounds", f"--benchmark-json={results}"]
        words = [sys.executable, "-m", "pytest", f"bench/{stem}.py", *options, "--device", setting.device, *chosen, *["--full"] * setting.full]
        made[stem] = Program(stem, words, results)
    profile = [sys.executable, "bench/profile_networks.py", "--device", setting.device, "--out", str(setting.out), *["--compiled"] * setting.full]
    made["profile"] = Program("profile", profile)
    if setting.rehearsal:
        tiny = ["--pixels", "32", "--batch", "2", "--width", "0.1"]
        small = Program("bench_head", [*made["bench_head"].words, "--scale", "0", "--case", "host time"], made["bench_head"].results)
        return [small, Program("profile", [*profile, *tiny])]
    return [made[name] for name in BUDGETS]


def measure(setting: Setting, seconds: float) -> int:
    """Runs the programs, merges and reports -> how many of them failed."""
    until = time.perf_counter() + (FULL if setting.full else seconds)
    outcomes: list[Outcome] = []
    chosen = programs(setting)
    for i, program in enumerate(chosen):
        if setting.say.interrupted:
            break
        if program.results is not None:
            program.results.unlink(missing_ok=True)
        left = until - REPORT - time.perf_counter()
        outcomes += run([command(program, setting, left - GRACE if setting.rehearsal else allowed(chosen[i:], left))], setting.say)
    found = [program.results for program in chosen if program.results is not None]
    whole = merged(found)
    if whole is not None:
        (setting.out / "results.json").write_text(json.dumps(whole, indent=1))
        if not setting.rehearsal:
            outcomes += run([Command("report", [sys.executable, "-m", "pages.report", str(setting.out)], 60, setting.environment())], setting.say)
        for path in found:
            path.unlink(missing_ok=True)
    setting.say(shown(outcomes, whole))
    return sum(outcome.state != "ok" for outcome in outcomes)


def allowed(chosen: Sequence[Program], left: float) -> float:
    """Seconds for the first of these programs where so many are left for all: its budget, more where there is time for all of them, less at the end.

    Less than LEAST, in which nothing would be measured, is none: the first programs are worth more than a little of each.
    """
    own, wanted = BUDGETS[chosen[0].name], sum(BUDGETS[program.name] for program in chosen)
    given = min(own * max(1.0, (left - GRACE) / wanted), left - GRACE)
    return given if given >= LEAST else 0.0


def command(program: Program, setting: Setting, budget: float) -> Command:
    """The program, told its budget and stopped a little after it; --full knows none."""
    told = [] if setting.full else ["--budget", f"{budget:.0f}"]
    more = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"} if setting.rehearsal else {}
    seconds = FULL if setting.full else budget + GRACE if budget > 0 else 0.0
    return Command(program.name, [*program.words, *told], seconds, setting.environment(**more))


def merged(found: Sequence[Path]) -> dict[str, Any] | None:
    """One pytest-benchmark file of several: the benchmarks one after the other, the machine of the first, times added; None of none."""
    files = [json.loads(path.read_text()) for path in found if path.exists() and path.stat().st_size]
    if not files:
        return None
    whole = dict(files[0])
    whole["benchmarks"] = [benchmark for file in files for benchmark in file["benchmarks"]]
    runs = [file["run"] for file in files]
    timed = sum(r["timed_s"] for r in runs)
    whole["run"] = {
        "set": "gpu-full" if runs[0]["set"] == "full" else "gpu",
        "timed_s": timed,
        "others_cores": round(sum(r["others_cores"] * r["timed_s"] for r in runs) / max(timed, 1), 2),
        "whole_s": sum(r["whole_s"] for r in runs),
    }
    return whole


def shown(outcomes: Sequence[Outcome], whole: dict[str, Any] | None) -> str:
    """Programs and targets; what failed last."""
    lines = ["", *(f"{o.name:18} {o.seconds:5.0f} s  {o.state}" for o in outcomes)]
    for benchmark in (whole or {}).get("benchmarks", []):
        row = benchmark["extra_info"]
        for goal in row.get("goals", []):
            reached = "reached" if goal["reached"] else "MISSED"
            lines.append(f"{reached:8} {row['case']}: {goal['text']}: {goal['value']:.3g} {goal['unit']}")
    bad = [o.name for o in outcomes if o.state != "ok"]
    return "\n".join([*lines, f"failed: {', '.join(bad)}" if bad else "every program ran through"])
