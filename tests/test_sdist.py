"""The source archive holds every file of the repository: its own tests pass, its documents' paths exist."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOT_CARRIED = "."
"""Names that begin so serve the repository alone: .gitignore, the entry of continuous integration."""


@pytest.fixture(scope="module")
def tracked():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: there is nothing to compare the archive with")
    names = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def packed(tracked, tmp_path_factory):
    """The names in a source archive that setuptools makes of the tracked files."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in tracked:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    code = f"import setuptools.build_meta as b; print(b.build_sdist({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return {member.name.partition("/")[2] for member in opened.getmembers() if member.isfile()}


def test_it_holds_every_file_of_the_repository(tracked, packed):
    missing = [name for name in tracked if name not in packed and not name.startswith(NOT_CARRIED)]
    assert not missing, missing


def test_it_holds_nothing_that_was_built(packed):
    built = [name for name in packed if name.endswith((".so", ".o", ".pyc")) or "__pycache__" in name]
    assert not built, built
