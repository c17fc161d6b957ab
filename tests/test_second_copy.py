"""A second copy of the operator library in one process: no crash, one sentence, and the first one serves."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import interflow_kernels
from interflow_kernels import _native

WITHOUT_OPERATORS = """
head = interflow_kernels.FusedInterflowHead((2,), 3)
assert head([torch.ones(1, 2, 3, 3)]).shape == (1, 3)
interflow_kernels.stage_tap(torch.ones(1, 2, 3, 3))
from interflow_kernels import _backend, _native
print(_backend.select("cpu"), _native.cpu_error)
"""
USE = """
head = interflow_kernels.FusedInterflowHead((2,), 3)
assert head([torch.ones(1, 2, 3, 3)]).shape == (1, 3)
torch.ops.interflow_kernels.stage_tap(torch.ones(1, 2, 3, 3), None, True, True)
from interflow_kernels import _backend, _native
print(_backend.select("cpu"), _native.cpu_error)
"""


def run(code, folder=None):
    return subprocess.run([sys.executable, "-c", "import sys, torch\n" + code], capture_output=True, text=True, cwd=folder)


@pytest.fixture
def copy(tmp_path):
    path = _native.library_path("_cpu")
    if path is None:
        pytest.skip("nothing was compiled")
    return str(shutil.copy(path, tmp_path / "another.abi3.so"))


def test_copy_behind_the_package(copy):
    done = run(f"import interflow_kernels\ntorch.ops.load_library({copy!r})\n{USE}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["native", "None"]
    assert done.stderr.count("\n") == 1
    for part in ("the operators come from", "another.abi3.so", "is not used", interflow_kernels.__version__):
        assert part in done.stderr


def test_copy_before_the_package(copy):
    """Of the same version: what is there is used."""
    done = run(f"torch.ops.load_library({copy!r})\nimport interflow_kernels\n{USE}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["native", "None"]
    assert done.stderr.count("\n") == 1
    assert "the operators come from" in done.stderr


def test_the_same_file_twice():
    done = run(f"torch.ops.load_library({str(_native.library_path('_cpu'))!r})\nimport interflow_kernels\n{USE}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout.split() == ["native", "None"]


def test_copy_of_another_version(copy):
    """Its operators may mean something else: plain PyTorch, with the reason."""
    version = interflow_kernels.__version__.encode()
    data = Path(copy).read_bytes()
    assert data.count(version + b"\0") >= 1
    Path(copy).write_bytes(data.replace(version + b"\0", b"9" + version[1:] + b"\0"))
    done = run(f"torch.ops.load_library({copy!r})\nimport interflow_kernels\n{WITHOUT_OPERATORS}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("eager interflow_kernels: the operators come from")
    assert "load one version of it alone" in done.stdout


def test_operators_defined_by_somebody_else():
    define = 'taken = torch.library.Library("interflow_kernels", "DEF")\ntaken.define("interflow_head(Tensor a) -> Tensor")'
    done = run(f"{define}\nimport interflow_kernels\n{WITHOUT_OPERATORS}")
    assert done.returncode == 0, done.stderr
    assert "eager" in done.stdout
    assert "are defined in this process already" in done.stderr


def test_second_copy_of_the_python_package(tmp_path):
    """Loaded under another name, as a hub would: it does not register a second time, and says why it runs in plain PyTorch."""
    shutil.copytree(Path(interflow_kernels.__file__).parent, tmp_path / "hub_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(f"import interflow_kernels\nsys.path.insert(0, {str(tmp_path)!r})\nimport hub_kernels._native\nprint(hub_kernels._native.cpu_error)\n{USE}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("another copy of this Python package")
    assert done.stdout.splitlines()[1].split() == ["native", "None"]
