"""`make gpu`: on a machine with an NVIDIA GPU and no network, builds for that GPU, runs every test that needs one, then the benchmarks: ten minutes.

Uses the Python that runs it, with torch, pytest and pytest-benchmark in it, and the CUDA toolkit; installs nothing. Each part has its own time
limit and a part that fails does not stop the others; the last lines say what failed. OUT gets results.json, report.md, report.html, speed.png,
profile.json, profile.md and log.txt. Exit status 1 where a part failed.

`make gpu-full` (--full) measures every case and profiles compiled networks too: hours, and no limit but that of a part that hangs.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent
SANITIZER = "tests/gpu/test_gpu_sanitizer.py"
TOTAL = 580.0  # seconds
LAST = 30.0  # of them for the report
FULL = 24 * 3600.0  # instead of TOTAL, and a measuring part's limit, with --full
GRACE = 30.0  # seconds after its budget for what a measuring part has begun
INTERRUPTED = 10.0  # seconds from a part's interrupt to its end by force
BUDGETS = {"bench_head": 85.0, "bench_stage_tap": 55.0, "bench_train_step": 135.0, "profile": 35.0, "bench_triton": 40.0}  # seconds
ASK = "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep='\\n')"


@dataclass(frozen=True)
class Part:
    """A command with its limit in seconds; `results`: the JSON that it writes.

    budget: the seconds that it is told to plan with (--budget), fewer where less is left for all parts that have one; None for a part that does not plan.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    results: Path | None = None
    budget: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "ok", "failed (exit status 1)" or "stopped after 60 s", in so many seconds, with what its output names as failed."""

    name: str
    state: str
    seconds: float
    failures: tuple[str, ...] = ()


def architecture(capability: tuple[int, int]) -> str:
    """What TORCH_CUDA_ARCH_LIST says for this GPU alone, as the default build names it: 9.0a for (9, 0)."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if capability == (9, 0) else "")


def folder_name(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def parts(python: str, out: Path, capability: tuple[int, int], full: bool = False, case: str = "") -> list[Part]:
    """In the order they run. full: every case, and no budgets; case: only cases whose name contains it."""
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    native = {**paths, "INTERFLOW_BACKEND": "native"}  # a fallback must not be taken for the kernels: where they cannot run the case fails
    build = {"INTERFLOW_CUDA": "1", "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST") or architecture(capability)}
    quiet = ["-q", "--disable-warnings", "-p", "no:cacheprovider"]
    marked = ["-m", "gpu", *quiet, "-rfEs", "--continue-on-collection-errors", "--durations=5"]

    def measuring(name: str, command: list[str], results: Path | None = None) -> Part:
        budget = None if full else BUDGETS[name]
        return Part(name, [python, *command], FULL if budget is None else budget + GRACE, native, results, budget)

    made = [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 150, build),
        Part("info", [python, "-m", "interflow_kernels.info"], 60, paths),
        # tests/vision needs Lightning's command line and holds no test for a GPU
        Part("tests", [python, "-m", "pytest", "tests", *marked, f"--ignore={SANITIZER}", "--ignore=tests/vision"], 200, paths),
    ]

    def benchmark(stem: str) -> Part:
        results = out / f"{stem}.json"
        chosen = [*(["--case", case] if case else []), *["--full"] * full]
        options = ["--benchmark-columns=median,iqr,rounds", f"--benchmark-json={results}", "--device", "cuda", *chosen]
        return measuring(stem, ["-m", "pytest", f"bench/{stem}.py", *quiet, "-rs", *options], results)

    made += [benchmark(stem) for stem in ("bench_head", "bench_stage_tap", "bench_train_step")]
    made.append(measuring("profile", ["bench/profile_networks.py", "--device", "cuda", "--out", str(out), *["--compiled"] * full]))
    made.append(benchmark("bench_triton"))  # each kernel compiles first
    return [*made, Part("sanitizer", [python, "-m", "pytest", SANITIZER, *marked], 200, paths)]  # slow, so what remains of the time is its


def allowed(chosen: Sequence[Part], left: float) -> float | None:
    """The budget of the first of these parts where so many seconds are left for all: each that has one gives up the same share."""
    budget = chosen[0].budget
    return None if budget is None else budget * min(1.0, max(left - GRACE, 0.0) / sum(part.budget or 0.0 for part in chosen))


def run(part: Part, log: TextIO, at_most: float, budget: float | None = None) -> Outcome:
    """Runs a part, its output here and in the log; what it started ends with it.

    At its limit, or where the user interrupts, it is interrupted, so that pytest writes what was measured; what then goes on is killed.
    """
    limit = min(part.seconds, at_most)
    start = time.perf_counter()
    if limit <= 0:
        return Outcome(part.name, "not begun, the time was spent", 0.0)
    command = [*part.command, *([] if budget is None else ["--budget", f"{budget:.0f}"])]
    _say(log, f"\n=== {part.name}: {' '.join(command)}")
    environment = {**os.environ, **part.environment, "PYTHONUNBUFFERED": "1"}
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits that interrupts are ignored
        )
    except OSError as error:
        return Outcome(part.name, f"failed ({error})", 0.0)
    assert process.stdout is not None
    causes: list[str] = []

    def stop(number: int, _: Any) -> None:
        causes.append("interrupted" if number == signal.SIGINT else f"stopped after {limit:.0f} s")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT if len(causes) == 1 else signal.SIGKILL)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPTED)

    before = {number: signal.signal(number, stop) for number in (signal.SIGALRM, signal.SIGINT)}
    signal.setitimer(signal.ITIMER_REAL, limit)
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            _say(log, lines[-1])
        code = process.wait()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    state = causes[0] if causes else "ok" if code == 0 else f"failed (exit status {code})"
    return Outcome(part.name, state, time.perf_counter() - start, tuple(line for line in lines if line.startswith(("FAILED ", "ERROR "))))


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


def summary(outcomes: Sequence[Outcome], whole: dict[str, Any] | None) -> str:
    """Parts, targets and failures, what went wrong last."""
    lines = ["", "=== summary", *(f"{o.name:18} {o.seconds:5.0f} s  {o.state}" for o in outcomes)]
    for benchmark in (whole or {}).get("benchmarks", []):
        row = benchmark["extra_info"]
        for goal in row.get("goals", []):
            reached = "reached" if goal["reached"] else "MISSED"
            lines.append(f"{reached:8} {row['case']}: {goal['text']}: {goal['value']:.3g} {goal['unit']}")
    lines += [failure for o in outcomes for failure in o.failures]
    bad = [o.name for o in outcomes if o.state != "ok"]
    return "\n".join([*lines, f"failed: {', '.join(bad)}" if bad else "every part ran through"])


def _say(log: TextIO, text: str) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None, help="where results go; default: bench/results/ and the GPU's name")
    parser.add_argument("--only", default="", help="only these parts, by name, separated by commas")
    parser.add_argument("--full", action="store_true", help="every case, hours; results in a folder of their own, whose name ends in -full")
    parser.add_argument("--case", default="", help="only cases whose name contains this text")
    given = parser.parse_args(arguments)
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)  # not here: the context would stay on the GPU that is measured
    if asked.returncode != 0:
        print(f"make gpu needs torch and an NVIDIA GPU that it can use: {asked.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return 2
    name, major, minor = asked.stdout.strip().splitlines()[-3:]
    out = (given.out or ROOT / "bench/results" / (folder_name(name) + "-full" * given.full)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with open(out / "log.txt", "w") as log:
        planned = parts(sys.executable, out, (int(major), int(minor)), given.full, given.case)
        return measure(planned, given.only, out, log, start, FULL if given.full else TOTAL)


def measure(planned: Sequence[Part], only: str, out: Path, log: TextIO, start: float, total: float = TOTAL) -> int:
    """Runs the parts, merges and reports; 1 where one of them failed."""
    chosen = [part for part in planned if not only or part.name in only.split(",")]
    for part in chosen:
        if part.results is not None:
            part.results.unlink(missing_ok=True)
    outcomes = []
    for i, part in enumerate(chosen):
        left = total - LAST - (time.perf_counter() - start)
        outcomes.append(run(part, log, left, allowed(chosen[i:], left)))
        if outcomes[-1].state == "interrupted":
            break
    found = [part.results for part in chosen if part.results is not None]
    whole = merged(found)
    if whole is not None:
        (out / "results.json").write_text(json.dumps(whole, indent=1))
        outcomes.append(run(Part("report", [sys.executable, "bench/report.py", str(out)], 60), log, 60))
        for path in found:
            path.unlink(missing_ok=True)
    _say(log, summary(outcomes, whole))
    return int(any(outcome.state != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
