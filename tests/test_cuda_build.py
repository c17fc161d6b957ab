"""How the CUDA library is built and loaded: what is asked of the build, that it links on any torch, and what it says where it cannot run."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from cuda_code import ARCHITECTURES
from cuda_library import ROOT, TOOLKIT, cuda_build, needs_nvcc

from interflow_kernels import _backend, _native
from old_glibc import OLDEST_GLIBC


@pytest.mark.slow
def test_the_library_needs_nothing_but_torch_and_the_system(built):
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("no nm and readelf")
    listed = subprocess.run([nm, "-D", "--undefined-only", built.library], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in listed.splitlines() if " w " not in line and "@" not in line}
    assert not [name for name in undefined if not name.startswith(("aoti_torch_", "torch_"))], undefined
    newest = max(tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", listed))
    assert newest <= OLDEST_GLIBC, re.findall(r"\S+@GLIBC_2\.[3-9]\d", listed)  # the CUDA runtime's too
    exported = subprocess.run([nm, "-D", "--defined-only", built.library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" cuda[A-Z]| __cuda", exported)  # the runtime inside is nobody else's
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.run([readelf, "-d", built.library], capture_output=True, text=True, check=True).stdout)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "cudart" in name]


LOAD = """
import shutil, sys, torch
import interflow_kernels._native as native

pytest_plugins = ["cuda_library"]  # its fixtures
assert native.cpu_error is None, native.cpu_error
assert "without CUDA" in native.cuda_error
torch.version.cuda = "13.1"
native.library_path = lambda stem: sys.argv[1]
native.build_info = lambda: {"cuda": "13.0", "cuda_architectures": "80"}
print(native._load_cuda())
for name in sys.argv[3:]:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("interflow_kernels::" + name, "CUDA"), name
assert not torch.cuda.is_initialized()
another = shutil.copy(sys.argv[1], sys.argv[2])
torch.ops.load_library(another)  # a second copy: registers nothing, says so
native.library_path = lambda stem: another
print(native._load_cuda())
"""


@pytest.mark.slow
def test_the_library_loads_and_registers_without_a_gpu(built, tmp_path):
    """Beside a CPU torch, with an empty stand-in for what libtorch_cuda would give."""
    if torch.version.cuda is not None:
        pytest.skip("torch is a CUDA build: it is loaded anyway")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    stand_in = tmp_path / "stand_in.so"
    code = "int aoti_torch_get_current_cuda_stream(int device, void** stream) { *stream = 0; return 0; }"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", stand_in], input=code, text=True, check=True)
    operators = sorted({name for f in ROOT.glob("csrc/*/cuda/*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', f.read_text())})
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(built.library), str(tmp_path / "another.so"), *operators],
        capture_output=True,
        text=True,
        env={**os.environ, "LD_PRELOAD": str(stand_in)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["None", "None"], done.stdout
    (sentence,) = (line for line in done.stderr.splitlines() if "the operators come from" in line)
    assert "another.so" in sentence


# --- what is asked of the build ---------------------------------------------------------------------------------------------
VARIABLES = ("INTERFLOW_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS")


@pytest.fixture
def asked(monkeypatch):
    """Sets build variables; all others are unset."""

    def set_to(**values: str) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    set_to()
    return set_to


@needs_nvcc
def test_the_decision(asked, monkeypatch):
    major = TOOLKIT.version[0]
    for torch_cuda, value, on, words in (
        (None, "", False, "a torch without CUDA"),
        (f"{major}.9", "", True, f"torch is built for CUDA {major}.9"),
        (f"{major}.9", "0", False, "INTERFLOW_CUDA=0"),
        (None, "1", True, "INTERFLOW_CUDA=1"),
        (f"{major - 1}.4", "", False, f"nvcc is of CUDA {major}, torch of CUDA {major - 1}.4"),
    ):
        asked(INTERFLOW_CUDA=value)
        decision = cuda_build.decide_cuda(torch_cuda)
        assert (decision.toolkit is not None) == on, (torch_cuda, value)
        assert words in decision.reason
    monkeypatch.setattr(cuda_build, "find_toolkit", lambda: None)
    asked()
    assert "no nvcc" in cuda_build.decide_cuda(f"{major}.0").reason
    asked(INTERFLOW_CUDA="1")
    with pytest.raises(SystemExit, match="install the CUDA toolkit or set CUDA_HOME"):
        cuda_build.decide_cuda(None)


@needs_nvcc
def test_architectures(capsys):
    assert cuda_build.architectures(TOOLKIT, "8.0;9.0a 12.0+PTX") == (("80", "90a", "120"), "120")
    assert cuda_build.architectures(TOOLKIT, "7.5 8.6") == (("86",), None)
    assert "7.5" in capsys.readouterr().out
    chosen = cuda_build.Cuda(TOOLKIT, "", *cuda_build.architectures(TOOLKIT, ""))
    assert chosen.listed() == " ".join(ARCHITECTURES) + "+PTX"
    assert chosen.gencodes()[3:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]
    older = cuda_build.Toolkit("nvcc", (12, 4), [], [], frozenset({80, 86, 89, 90}))
    assert cuda_build.architectures(older, "") == (("80", "86", "89", "90a"), "90a")


@needs_nvcc
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(INTERFLOW_CUDA="yes"), ("INTERFLOW_CUDA must be 0 or 1", "'yes'")),
        (dict(INTERFLOW_CUDA="1", TORCH_CUDA_ARCH_LIST="hopper"), ("TORCH_CUDA_ARCH_LIST", "'8.0 9.0a 12.0+PTX'", "'hopper'")),
        (dict(INTERFLOW_CUDA="1", TORCH_CUDA_ARCH_LIST="6.0 7.5"), ("TORCH_CUDA_ARCH_LIST", "8.0 or newer", "'6.0 7.5'")),
        (dict(INTERFLOW_CUDA="1", TORCH_CUDA_ARCH_LIST="99.0"), ("TORCH_CUDA_ARCH_LIST names 99.0", "it knows 8.0")),
        (dict(MAX_JOBS="many"), ("MAX_JOBS must be a number", "'many'")),
        (dict(MAX_JOBS="0"), ("MAX_JOBS must be a number", "'0'")),
    ],
    ids=lambda v: None if isinstance(v, tuple) else " ".join(v.values()),
)
def test_wrong_values_are_one_sentence(asked, values, words):
    asked(**values)
    with pytest.raises(SystemExit) as error:
        cuda_build.jobs() and cuda_build.decide_cuda(None)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


# --- loading: cause and remedy --------------------------------------------------------------------------------------------
BUILT = "80 86 89 90a 100 120+PTX"


@pytest.mark.parametrize(
    ("built_for", "capability", "runs"),
    [
        *((BUILT, c, True) for c in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0))),
        *((BUILT, c, False) for c in ((7, 5), (11, 0))),
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("90a+PTX", (10, 0), False),  # PTX of a is for 9.0 alone
        ("86", (8, 0), False),
        ("80+PTX", (9, 0), True),
        ("120", (13, 0), False),
    ],
)
def test_which_gpus_a_build_serves(built_for, capability, runs):
    error = _native.architecture_error(built_for, capability, "GPU X")
    assert (error is None) == runs
    if not runs:
        assert "GPU X has compute capability" in error and "\n" not in error
        assert "need 8.0" in error if capability < (8, 0) else f"TORCH_CUDA_ARCH_LIST='{capability[0]}.{capability[1]}'" in error


def test_why_the_cuda_library_is_not_there(monkeypatch, tmp_path):
    def error() -> str:
        text = _native._load_cuda()
        assert text is not None and "\n" not in text
        return text

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "build without CUDA; install one" in error()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_native, "cpu_error", "the CPU's reason")
    assert error() == "the CPU's reason"
    monkeypatch.setattr(_native, "cpu_error", None)
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "", "cuda_reason": "no nvcc at build time"})
    assert "not built (no nvcc at build time)" in error() and "INTERFLOW_CUDA=1 pip install" in error()
    monkeypatch.setattr(_native, "build_info", lambda: None)
    assert "no build information" in error()
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "12.8"})
    assert "built by CUDA 12.8" in error() and "has CUDA 13.0" in error() and "CUDA_HOME=/usr/local/cuda-13.0" in error()
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "13.2"})
    monkeypatch.setattr(_native, "library_path", lambda stem: None)
    assert "_cuda is missing" in error()
    broken = tmp_path / "_cuda.abi3.so"
    broken.write_text("not a library")
    monkeypatch.setattr(_native, "library_path", lambda stem: broken)
    assert "does not load into torch" in error() and "INTERFLOW_CUDA=1 pip install" in error()


def test_a_gpu_is_asked_once_and_the_reason_reaches_the_choice(monkeypatch):
    asked = []
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(_native, "_device_errors", {})
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "13.0", "cuda_architectures": BUILT})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: asked.append(index) or ((9, 0) if index == 0 else (7, 5)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU number {index}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_backend, "_warned", set())
    monkeypatch.setattr(_backend.registration, "reason_against", lambda device: "there is no Triton")
    assert _backend.select("cuda", 0) == _backend.select("cuda", 0) == _backend.select("cuda") == "native"
    with pytest.warns(UserWarning, match="GPU number 1 has compute capability 7.5.*there is no Triton"):
        assert _backend.select("cuda", 1) == "eager"
    assert asked == [0, 1]
    with _backend.backend("native"), pytest.raises(RuntimeError, match="cannot run on device 'cuda': GPU number 1"):
        _backend.select("cuda", 1)
    assert _backend.select("cuda", 0, torch.float64) == "eager"
    with _backend.backend("native"), pytest.raises(RuntimeError, match="fp64"):
        _backend.select("cuda", 0, torch.float64)
    assert _backend.select("cpu", None, torch.float64) == _backend.select("meta", None, torch.float64) == "native"


def test_the_choice_is_a_constant_to_the_compiler(monkeypatch):
    """torch.compile with fullgraph meets the question for a GPU's capability, and takes the answer as it is."""
    monkeypatch.setattr(_native, "cuda_error", None)
    monkeypatch.setattr(_native, "_device_errors", {})
    monkeypatch.setattr(_native, "build_info", lambda: {"cuda": "13.0", "cuda_architectures": BUILT})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "GPU")

    @torch.compile(fullgraph=True, backend="eager")
    def f(x):
        return x + 1 if _backend.select("cuda", 0) == "native" else x

    assert f(torch.zeros(1)).item() == 1
