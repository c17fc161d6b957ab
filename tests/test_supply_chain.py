"""What is said about the package's dependencies is complete: pins, hashes, licences."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

ROOT = Path(__file__).parent.parent
NOT_PINNED = {"kernels"}
"""Of extras that the development environment does not have."""

NOT_INSTALLED = {"openvino"}
"""Of extras that `make .venv/installed` leaves out, so that its metadata are not at hand."""


def pins(name: str) -> dict[str, str]:
    """{package: version} of a file of constraints."""
    found = re.findall(r"^([\w.-]+)==([\w.+-]+)", (ROOT / name).read_text(), re.MULTILINE)
    return {canonicalize_name(package): version for package, version in found}


def asked() -> set[str]:
    """All that pyproject.toml names, but the package's own extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in project["project"]["optional-dependencies"].values():
        listed += extra
    return {canonicalize_name(Requirement(text).name) for text in listed}


def test_everything_that_is_asked_for_is_pinned():
    assert asked() - set(pins("constraints.txt")) == NOT_PINNED


def test_every_pin_has_hashes():
    assert pins("constraints-hashed.txt") == pins("constraints.txt"), "make lock writes constraints-hashed.txt anew"
    blocks = re.split(r"\n(?=\S)", (ROOT / "constraints-hashed.txt").read_text())
    without = [block.split()[0] for block in blocks if not block.startswith("#") and not re.search(r"--hash=sha256:[0-9a-f]{64}\b", block)]
    assert not without, without


def test_malicious_uploads_are_excluded():
    """lightning 2.6.2 and 2.6.3."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (lightning,) = (Requirement(text) for text in project["optional-dependencies"]["train"] if text.startswith("lightning"))
    assert not any(lightning.specifier.contains(version) for version in ("2.6.2", "2.6.3"))
    assert pins("constraints.txt")["lightning"] not in ("2.6.2", "2.6.3")


def test_licences_are_listed():
    rows = re.findall(r"^\| ([\w.-]+) \| ([\w.+-]+) \| (\w+) \| (.+) \|$", (ROOT / "docs/licences.md").read_text(), re.MULTILINE)
    listed = {canonicalize_name(name): version for name, version, *_ in rows if name != "package"}
    pinned = pins("constraints.txt")
    missing = asked() - set(listed) - NOT_PINNED - NOT_INSTALLED
    assert not missing, f"make licences writes docs/licences.md anew: {missing}"
    others = {name: version for name, version in listed.items() if pinned.get(name) not in (version, None)}
    assert not others, f"make licences writes docs/licences.md anew: {others}"
    demanding = {name for name, _, what, text in rows if what == "run" and re.search(r"\b[AL]?GPL", text)}
    assert not demanding, demanding
