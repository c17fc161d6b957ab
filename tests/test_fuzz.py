"""A short form of the fuzz, seeded, and proof that it notices what it is for."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def fuzz(*arguments):
    return subprocess.run([sys.executable, "-m", "tests.fuzz", *arguments], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_calls_return_what_the_definition_gives_or_one_sentence():
    done = fuzz("--calls", "150", "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("150 calls: ") == 12
    assert done.stdout.count(" whole returned") == 12


SPOILED = """
import sys, torch
import interflow_kernels
from interflow_kernels import ops
from tests.fuzz import child, targets

def spoiled(f):
    def call(*a, **k):
        m, p, mask = f(*a, **k)
        return m, p * FACTOR, mask
    return call

class Raw:
    stage_tap = staticmethod(spoiled(torch.ops.interflow_kernels.stage_tap))
targets.raw = Raw
found = [child.judge(child.draw("raw_stage_tap", 0, i))[0] for i in range(40)]
print(sum(f is not None for f in found), next((f for f in found if f), ""))
"""


@pytest.mark.parametrize(("factor", "seen"), [("1.0", False), ("1.0001", True), ("float('nan')", True)])
def test_a_wrong_result_is_found(factor, seen):
    done = subprocess.run([sys.executable, "-c", SPOILED.replace("FACTOR", factor)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (int(done.stdout.split()[0]) > 5) is seen, done.stdout
    assert ("p[" in done.stdout) is seen


CRASH = """
import ctypes, sys
from pathlib import Path
from tests.fuzz import child
child.TARGETS["stage_tap"] = lambda r: ctypes.string_at(0) if r.random() < 0.2 else r.no_such_thing
child.main("stage_tap", 0, int(sys.argv[1]), 20, Path(sys.argv[2]))
"""


def test_a_crash_leaves_its_number(tmp_path):
    done = subprocess.run([sys.executable, "-c", CRASH, "0", str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode < 0
    last = (tmp_path / "progress").read_text().splitlines()[-1]
    assert last.endswith(" begun")
    findings = (tmp_path / "findings").read_text().splitlines()
    assert len(findings) == int(last.split()[0])  # each call before it
    assert all("the drawer failed" in line for line in findings)


def test_unknown_errors_are_not_accepted():
    script = (
        "from tests.fuzz.oracle import complaint as c\n"
        "good = [TypeError('weight must be a tensor, got list'), RuntimeError('stage_tap: u must be [B, C, H, W], got [0]')]\n"
        "bad = [AttributeError('x must be y'), RuntimeError('host.h:41, u must be 3'), RuntimeError('a must be\\nb'), ValueError('no'), AssertionError()]\n"
        "assert not any(map(c, good)); assert all(map(c, bad)); print('ok')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "ok\n", done.stderr[-1000:]
