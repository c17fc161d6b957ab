"""Every part of `make gpu` and each of the three calls on the CPU, by the commands that a GPU gets: no part meets one with a mistake of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Runs a call's script once -> what it left and what it said."""
    out = tmp_path_factory.mktemp("rehearsal")

    def run(call):
        environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable, "OUT": str(out)}
        done = subprocess.run([str(ROOT / f"bench/gpu/{call}.sh"), "--kit", "none"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return out, done.stdout

    return run


def read(path):
    data = json.loads(path.read_text())
    assert data["rehearsal"] and data["machine"]["versions"]["torch"] and data["commit"]
    return data["rows"]


def test_call_1_smoke_and_speed(rehearsed):
    out, said = rehearsed("call1")
    rows = read(out / "smoke.json")
    assert {row["state"] for row in rows} <= {"ok", "skipped"}
    assert {row["group"] for row in rows} == {"head", "tap", "end", "launches", "triton", "large"} and len(rows) > 50
    found = read(out / "speed.json")
    assert {"copy", "copy by a kernel", "read", "launch", "head", "tap", "end"} == {row["what"] for row in found} and not any("failed" in row for row in found)
    assert any(row.get("map") == "five boundaries" and row["pass"] == "backward" for row in found)
    assert "a rehearsal, no measurement" in said and (out / "log.txt").exists()


def test_call_2_suites(rehearsed):
    out, _ = rehearsed("call2")
    rows = {row["suite"]: row for row in read(out / "test.json")}
    assert set(rows) == {"native", "triton", "sanitizer"} and all(row["failed"] == 0 and row["passed"] for row in rows.values())


def test_call_3_headline_and_the_rest(rehearsed):
    out, said = rehearsed("call3")
    rows = read(out / "headline.json")
    assert not any("failed" in row or "left_out" in row for row in rows)
    assert {row["provider"] for row in rows} == {"Interflow fused", "plain", "Interflow naive"}
    assert {row["case"].split(",")[0] for row in rows} == {"vgg16", "vgg16_bn"}
    assert any("inductor" in row and row["torch"] for row in rows)
    assert json.loads((out / "results.json").read_text())["benchmarks"] and (out / "profile.json").exists()
    assert "every program ran through" in said
