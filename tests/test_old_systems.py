"""The compiled libraries need no newer system than manylinux_2_28, whatever compiler and C library built them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from interflow_kernels import _native

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}
"""Of RHEL 8, and what Hugging Face asks of kernels."""
LIBRARIES = [path for stem in ("_cpu", "_cuda", "_C") for path in sorted(_native.libraries.glob(f"{stem}.*so"))]


def needed(library):
    """(library, version) of every versioned symbol that it takes from others, with the symbol."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    for symbol, kind, version in re.findall(r"(\S+)@+(GLIBC|GLIBCXX|CXXABI)_([\d.]+)", listed):
        yield symbol, kind, tuple(map(int, version.split(".")))


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name.partition(".")[0])
def test_no_symbol_is_newer(library):
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    found = list(needed(library))
    assert found
    assert [each for each in found if each[2] > NEWEST[each[1]]] == []


def test_something_is_checked():
    if _native.library_path("_cpu") is None:
        pytest.skip("nothing was compiled")
    assert len(LIBRARIES) >= 2 and all(isinstance(path, Path) for path in LIBRARIES)
