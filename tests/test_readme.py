"""The README's code runs as pasted, its paths exist, and its figures are those of the committed results."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, tmp_path):
    done = subprocess.run([sys.executable, "-c", PYTHON[number]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch" not in done.stderr


def test_there_is_code():
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("document", ["README.md", "docs/decisions.md"])
def test_paths_exist(document):
    named = re.findall(r"`((?:csrc|interflow_kernels|python|bench|tests|docs)/[\w./-]*)`", (ROOT / document).read_text())
    assert named
    for path in named:
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([\w-]+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_measured_ratios_are_those_of_the_results():
    results = json.loads((ROOT / "bench/results/cpu-2core/head.json").read_text())
    rows = {b["extra_info"]["case"]: b["extra_info"] for b in results["benchmarks"] if b["extra_info"]["provider"] == "ours"}
    lines = re.findall(r"^\| (forward [^|]+) \| ([\d.]+)x \| ([\d.]+) \|$", README, re.MULTILINE)
    assert len(lines) >= 6
    for case, ratio, share in lines:
        assert float(ratio) == pytest.approx(rows[case]["peer_ratio"][0], abs=0.006), case
        assert float(share) == pytest.approx(rows[case]["read_share"][0], abs=0.006), case
