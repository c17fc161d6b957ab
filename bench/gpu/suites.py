"""The part test: every test that needs a GPU, by pytest with several workers; Triton's with few examples each, compute-sanitizer beside them."""

import importlib.util
import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .process import ROOT, Command, run
from .record import Record, machine_line, table
from .setting import Setting

SANITIZER = "tests/gpu/test_gpu_sanitizer.py"
TRITON = "tests/triton_kernels"
EXAMPLES = "8"  # that hypothesis draws: in Triton each is a new compilation
TOOLS = "memcheck or racecheck"
ASK = "import json, sys, torch; from harness import machine; print(json.dumps(machine.describe(torch.device(sys.argv[1]))))"


@dataclass(frozen=True)
class Suite:
    """What pytest gets, with how many workers, and the share of the part's time that it may take."""

    name: str
    arguments: Sequence[str]
    workers: int
    share: float
    environment: tuple[tuple[str, str], ...] = ()


def suites(rehearsal: bool) -> tuple[list[Suite], list[Suite]]:
    """Those that run first, and those that run beside each other after them. A rehearsal runs a few tests of each on the CPU, by the same commands."""
    examples = (("INTERFLOW_EXAMPLES", EXAMPLES),)
    if rehearsal:
        native = Suite("native", ["tests/gpu/test_gpu_tap.py", "-k", "empty_and_thin", "-m", "not gpu"], 2, 0.5)
        triton = Suite("triton", [f"{TRITON}/test_triton_tap.py", "-k", "errors_of_raw_calls"], 0, 0.4, (*examples, ("TRITON_INTERPRET", "1")))
        return [native], [triton, Suite("sanitizer", [SANITIZER, "-k", "told", "-m", "not gpu"], 0, 0.4)]
    native = Suite("native", [*files(), "-m", "gpu"], 8, 0.5)
    triton = Suite("triton", [TRITON, "-m", "gpu"], 12, 0.45, examples)
    return [native], [triton, Suite("sanitizer", [SANITIZER, "-m", "gpu", "-k", TOOLS], 2, 0.45)]


def files() -> list[str]:
    """Those with tests for a GPU, but for Triton's and the sanitizer's, which run by themselves."""
    own = (path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "pytest.mark.gpu" in path.read_text())
    names = [path.relative_to(ROOT).as_posix() for path in own]
    return [name for name in names if name != SANITIZER and not name.startswith(TRITON)]


def command(suite: Suite, setting: Setting, seconds: float) -> Command:
    """pytest on the suite, failures in a line each; what it found also goes to SUITE.xml."""
    workers = ["-n", str(suite.workers)] if suite.workers and importlib.util.find_spec("xdist") else []
    quiet = ["-q", "--disable-warnings", "-p", "no:cacheprovider", "-p", "no:benchmark", "-rfE", "--tb=line", f"--junitxml={found_in(suite, setting)}"]
    more = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "INTERFLOW_BACKEND": "auto", **dict(suite.environment)}
    return Command(suite.name, [sys.executable, "-m", "pytest", *suite.arguments, *workers, *quiet], seconds, setting.environment(**more))


def found_in(suite: Suite, setting: Setting) -> Path:
    return setting.out / f"test-{suite.name}.xml"


def test(setting: Setting, seconds: float) -> int:
    """All suites -> how many of them are not as they should be."""
    record = Record(setting.out / "test.json", "test", setting.device, setting.kit)
    asked: list[str] = []
    run([Command("machine", [sys.executable, "-c", ASK, setting.device], 60, setting.environment())], setting.say, hear=lambda _, line: asked.append(line))
    if asked and asked[-1].startswith("{"):
        record.about(json.loads(asked[-1]))
    until = time.perf_counter() + seconds
    for together in suites(setting.rehearsal):
        if setting.say.interrupted:
            break
        for suite in together:
            found_in(suite, setting).unlink(missing_ok=True)
        outcomes = run([command(suite, setting, min(seconds * suite.share, until - time.perf_counter())) for suite in together], setting.say)
        for suite, outcome in zip(together, outcomes, strict=True):
            counts = counted(found_in(suite, setting))
            record.add({"suite": suite.name, "state": outcome.state, "seconds": round(outcome.seconds, 1), **counts})
            found_in(suite, setting).unlink(missing_ok=True)
    setting.say(shown(record.data))
    return sum(not right(row) for row in record.data["rows"])


def counted(path: Path) -> dict[str, Any]:
    """passed, failed, skipped and the names of what failed, from pytest's XML; empty where pytest was ended before it wrote it."""
    if not path.exists() or not path.stat().st_size:
        return {}
    cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    wrong = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = [c for c in cases if c.find("skipped") is not None]
    reasons = {str(c.find("skipped").get("message")) for c in skipped}  # type: ignore[union-attr]
    return {
        "passed": len(cases) - len(wrong) - len(skipped),
        "failed": len(wrong),
        "skipped": len(skipped),
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in wrong],
        "reasons": sorted(reasons)[:20],
    }


def right(row: dict[str, Any]) -> bool:
    """Whether every test of a suite that ran passed, and some did."""
    return row["state"] == "ok" and row.get("failed") == 0 and row.get("passed", 0) > 0


def shown(data: dict[str, Any]) -> str:
    """Failures by name, then a line for each suite."""
    wrong = [f"FAILED {row['suite']}: {name}" for row in data["rows"] for name in row.get("failures", [])]
    rows = [[row["suite"], *(row.get(key, "-") for key in ("passed", "failed", "skipped")), row["state"], f"{row['seconds']:.0f} s"] for row in data["rows"]]
    return "\n".join(["", *wrong, table(rows, ["test", "passed", "failed", "skipped", "state", "time"]), machine_line(data)])
