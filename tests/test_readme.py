"""The README's code runs as pasted, its paths exist, and its figures are those of the committed results."""

import re
import sys
from pathlib import Path

import pytest
from document_blocks import blocks, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMITTED = "bench/results/cpu-2core"
PYTHON = blocks(ROOT / "README.md")


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_blocks_run(number, tmp_path):
    done = run(PYTHON[number], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch" not in done.stderr


def test_there_is_code():
    assert len(PYTHON) >= 2


DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "csrc/README.md",
    ROOT / "bench/README.md",
    *sorted(ROOT.glob("docs/**/*.md")),
]
"""All that is written for people to read, but the reports of benchmarks."""


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_exist(document):
    text = document.read_text()
    named = re.findall(r"`((?:csrc|interflow_kernels|python|bench|tests|docs)/[\w./-]*)`", text)
    assert named or document.parent.name in ("decisions", "docs", "guide", "api") or document.name == "README.md"
    for path in named:
        assert (ROOT / path).exists() or "NAME" in path, f"{document} names {path}"  # NAME: of an operator to be
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (document.parent / link).exists(), f"{document} links {link}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_is_at_most_120_columns_wide(document):
    fenced = False
    for number, line in enumerate(document.read_text().splitlines(), 1):
        fenced ^= line.startswith("```")
        prose = not fenced and not line.startswith(("|", "    ", "<")) and "http" not in line
        assert not prose or len(line) <= 120, f"{document}:{number} has {len(line)} columns"


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    documents = README + (ROOT / "docs/benchmarks.md").read_text()
    for target in set(re.findall(r"(?:`|^    )make ([\w-]+)", documents, re.MULTILINE)):
        assert re.search(rf"^(?:[\w-]+ )*{target}(?: [\w-]+)*:", makefile, re.MULTILINE), target


def test_gpu_section_is_that_of_the_committed_results():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from pages import gpu_readme
    finally:
        sys.path.remove(str(ROOT / "bench"))
    text = gpu_readme.section(gpu_readme.FOLDER)
    assert text.count("| vgg16") >= 4 and "NVIDIA" in text
    assert gpu_readme.rewritten(README, text, (gpu_readme.BEGIN, gpu_readme.END)) == README, "run `make bench-readme`"


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


def test_the_newest_environment_is_free_of_this_ones_pins():
    """A pin of what `make test-newest` asks for in another version leaves pip nothing to install."""
    makefile = (ROOT / "Makefile").read_text()
    wanted = {word.split("==")[0] for word in re.search(r"^NEWEST \?= (.+)$", makefile, re.M)[1].split()}
    left_out = set(re.search(r"grep -vE '\^\(([\w|-]+)\)=='", makefile)[1].split("|"))
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert {"torch", "torchvision"} <= wanted
    assert not wanted & (pinned - left_out)
