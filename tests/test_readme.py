"""The README's code runs as pasted, its paths exist, and its figures are those of the committed results."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMITTED = "bench/results/cpu-2core"
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, tmp_path):
    done = subprocess.run([sys.executable, "-c", PYTHON[number]], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch" not in done.stderr


def test_there_is_code():
    assert len(PYTHON) >= 2


@pytest.mark.parametrize("document", ["README.md", "docs/decisions.md", "docs/benchmarks.md", "docs/profile-cpu-2core.md"])
def test_paths_exist(document):
    named = re.findall(r"`((?:csrc|interflow_kernels|python|bench|tests|docs)/[\w./-]*)`", (ROOT / document).read_text())
    assert named
    for path in named:
        assert (ROOT / path).exists(), f"{document} names {path}"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "docs/benchmarks.md").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([\w-]+)", documents, re.MULTILINE)):
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), target


def test_speed_section_is_that_of_the_committed_results():
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from pages.readme import rewritten, section
        from pages.results import load
    finally:
        sys.path.remove(str(ROOT / "bench"))
    results = load(ROOT / COMMITTED)
    assert len(results.comparable()) >= 20
    assert rewritten(README, section(results, COMMITTED)) == README, "run `make bench-readme`"
    assert results.digest.encode() in (ROOT / COMMITTED / "speed.png").read_bytes(), f"run `PYTHONPATH=bench python -m pages.report {COMMITTED}`"
