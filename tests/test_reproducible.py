"""Two builds of the same sources give the same bytes: the source archive, and the wheel with its compiled libraries."""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import reproducible  # noqa: E402

BUILD = "import sys, setuptools.build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def copy_of_sources(folder: Path) -> Path:
    """The files that git knows, in a folder, with times of their own."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the sources is not known")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
            (folder / name).chmod((ROOT / name).stat().st_mode)
    return folder


def built(kind: str, folder: Path, into: Path, epoch: str | None = None) -> Path:
    """A wheel or sdist of the sources in `folder`, built as a frontend does without isolation, for the CPU."""
    into.mkdir()
    environment = {**os.environ, "INTERFLOW_CUDA": "0", "INTERFLOW_NATIVE": str(int(kind == "wheel")), "SOURCE_DATE_EPOCH": epoch}
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(into)],
        cwd=folder,
        env={name: value for name, value in environment.items() if value is not None},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (made,) = into.iterdir()
    return made


def digests(archive: Path) -> dict[str, str]:
    """Of each file in an archive, to name the ones that differ."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as opened:
            return {name: hashlib.sha256(opened.read(name)).hexdigest() for name in opened.namelist()}
    with tarfile.open(archive) as opened:
        return {each.name: hashlib.sha256(opened.extractfile(each).read()).hexdigest() for each in opened.getmembers() if each.isfile()}


def assert_same(one: Path, other: Path) -> None:
    a, b = digests(one), digests(other)
    differing = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    assert not differing, differing
    assert one.read_bytes() == other.read_bytes(), "the files are the same, but not how they are packed"


@pytest.fixture(scope="module")
def two_trees(tmp_path_factory):
    """Copies at paths of different length, of which one lies in a folder as others may read it, the other as only its owner may."""
    one, other = copy_of_sources(tmp_path_factory.mktemp("a")), copy_of_sources(tmp_path_factory.mktemp("another-and-longer"))
    for path in other.rglob("*"):
        os.utime(path, (10**9, 10**9))
        path.chmod(path.stat().st_mode & 0o700)
    return one, other


def test_source_archives(two_trees, tmp_path):
    one, other = (built("sdist", tree, tmp_path / str(i)) for i, tree in enumerate(two_trees))
    assert_same(one, other)
    with tarfile.open(one) as opened:
        members = opened.getmembers()
    assert {(each.uid, each.gid, each.uname, each.gname) for each in members} == {(0, 0, "", "")}
    assert {str(each.mtime) for each in members} == {reproducible.TIME}
    assert [each.name for each in members] == sorted(each.name for each in members)
    later = built("sdist", two_trees[0], tmp_path / "later", "1700000000")
    assert later.read_bytes() != one.read_bytes() and digests(later) == digests(one)


@pytest.mark.slow
def test_wheels(two_trees, tmp_path):
    one, other = (built("wheel", tree, tmp_path / str(i)) for i, tree in enumerate(two_trees))
    assert_same(one, other)
    with zipfile.ZipFile(one) as opened:
        library = opened.read("interflow_kernels/_cpu.abi3.so")
        assert {each.date_time for each in opened.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert str(two_trees[0]).encode() not in library and b"csrc/library.cpp" in library


def test_a_wrong_time_is_refused(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(SystemExit, match="^SOURCE_DATE_EPOCH must be whole seconds since 1970, got 'yesterday'$"):
        reproducible.set_time()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    reproducible.set_time()
    assert os.environ["SOURCE_DATE_EPOCH"] == reproducible.TIME
