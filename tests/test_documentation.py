"""The documentation site: code runs as pasted, every page is in the navigation, troubleshooting knows every sentence that the package raises."""

import ast
import functools
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest
import torchvision_operators
from document_blocks import blocks, run

import interflow_kernels
import interflow_vision

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([DOCS / "index.md", *DOCS.glob("guide/*.md"), *DOCS.glob("api/*.md")])
SLOW = ("torch.compile(", "torch.onnx.export(", 'attach("')
"""What takes more than a few seconds."""
NEEDS = {'attach("': "timm", "torch.onnx.export(": "onnxscript"}
"""Text in a block -> the package that it needs beside torch."""


def cases():
    for page in PAGES:
        for number, code in enumerate(blocks(page)):
            marks = [pytest.mark.slow] if any(text in code for text in SLOW) else []
            yield pytest.param(code, id=f"{page.stem}-{number}", marks=marks)


def there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None or (torchvision_operators.FOLDER / package).is_dir()


@pytest.mark.parametrize("code", list(cases()))
def test_python_blocks_run(code, tmp_path):
    for text, package in NEEDS.items():
        if text in code and not there(package):
            pytest.skip(f"needs {package}, which is not installed")
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch" not in done.stderr


def test_a_block_that_fails_is_seen(tmp_path):
    assert run("assert 1 == 2, 'wrong'", tmp_path).returncode == 1


def test_there_is_code():
    assert sum(len(blocks(page)) for page in PAGES) >= 20


def test_every_page_is_in_the_navigation():
    named = re.findall(r"([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("package", [interflow_kernels, interflow_vision], ids=lambda package: package.__name__)
def test_every_public_name_is_in_the_reference(package):
    shown = re.findall(rf"^::: {package.__name__}\.(?:\w+\.)*(\w+)$", (DOCS / f"api/{package.__name__}.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(name for name in package.__all__ if name != "__version__")


def test_snippets_are_sections_of_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in PAGES:
        for section in re.findall(r'--8<-- "README.md:(\w+)"', page.read_text()):
            start, end = (f"<!-- --8<-- [{word}:{section}] -->" for word in ("start", "end"))
            assert 0 < readme.find(start) < readme.find(end), section


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    mkdocs = ROOT / ".venv/docs/bin/mkdocs"
    if not mkdocs.exists():
        pytest.skip("mkdocs is not there: `make docs` installs it into .venv/docs")
    done = subprocess.run([mkdocs, "build", "--strict", "--site-dir", tmp_path / "site"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site/guide/troubleshooting.html").exists()


# --- troubleshooting: headings are the sentences of the code, and every sentence has one ----------------------------------

ELLIPSIS = "…"
PACKAGES = ("interflow_kernels", "python/interflow_vision/models", "python/interflow_vision/backbones")
WITHOUT_HEADING = ("testing.py", "tune.py", "tiles.py")
"""Files of tools for developers."""

GENERAL = {f"{ELLIPSIS} must be {ELLIPSIS}, got {ELLIPSIS}{ELLIPSIS}": f"{ELLIPSIS} must be a tensor, got {ELLIPSIS}"}
"""What is filled in for the middle of a sentence that would fit every heading."""


def said(node: ast.AST, names: dict[str, ast.AST]) -> str | None:
    """The text of an expression with … for what is put in; a name that the file gives a text is that text."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.Name) and node.id in names:
        return said(names[node.id], {})
    if isinstance(node, ast.JoinedStr):
        return "".join(said(part, {}) or ELLIPSIS for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return "".join(said(side, names) or ELLIPSIS for side in (node.left, node.right))
    return None


def sentences(path: Path) -> set[str]:
    """What a file raises and warns of, and what its functions and names say for others to raise."""
    tree = ast.parse(path.read_text())
    names = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
            found.add(said(node.exc.args[0], names))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "fail"):
            found.add(said(node.args[0], names))
        elif isinstance(node, ast.Return) and path.name in ("_native.py", "_backend.py", "registration.py") and node.value is not None:
            found.add(said(node.value, names))
    found = {GENERAL.get(sentence, sentence) for sentence in found}
    found |= {said(value, {}) for name, value in names.items() if name.startswith("_NO_")}
    return {re.sub(f"{ELLIPSIS}+", ELLIPSIS, text) for text in found if text and len(re.findall(r"[A-Za-z]{2,}", text)) >= 3}


@functools.cache
def pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split(ELLIPSIS))), re.DOTALL)


def fits(heading: str, sentence: str) -> bool:
    """Whether a heading is the sentence, or its beginning; its … stands for any text."""
    return pattern(heading).match(sentence) is not None


HEADINGS = re.findall(r"^### `(.+)`$", (DOCS / "guide/troubleshooting.md").read_text(), re.MULTILINE)
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
SENTENCES = {path: sentences(path) for path in FILES}


def test_headings_are_sentences_of_the_code():
    known = set().union(*SENTENCES.values())
    stale = [heading for heading in HEADINGS if not any(fits(heading, sentence) for sentence in known)]
    assert not stale, stale


def test_every_sentence_of_the_kernels_has_a_heading():
    raised = {
        sentence: path.name
        for path, found in SENTENCES.items()
        if path.parts[len(ROOT.parts)] == "interflow_kernels" and path.name not in WITHOUT_HEADING
        for sentence in found
    }
    assert len(raised) >= 100
    missing = {sentence: where for sentence, where in raised.items() if not any(fits(heading, sentence) for heading in HEADINGS)}
    assert not missing, missing


def test_no_heading_fits_everything():
    assert not any(fits(heading, "features must have 3 tensors") for heading in HEADINGS)
