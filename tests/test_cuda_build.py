"""The CUDA library without a GPU: it builds and links on any torch, and its kernels keep what the table promises on every architecture."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cuda_code import ARCHITECTURES, Kernel, Promise, complaints, disassembler, forbidden, kernels_of, opcode_of, parse_log

from interflow_kernels import _backend, _native

ROOT = Path(__file__).parent.parent
KERNEL_FILES = sorted(ROOT.glob("csrc/cuda/*.cu"))

PATH = r"\(interflow::TapPath\)"
PROMISES = (
    # pooled, weights, y: the tail multiplies on tensor cores; two blocks of 256 threads a multiprocessor
    Promise("interflow_head_forward_kernel<float>", 128, loads=True),
    Promise("interflow_head_forward_kernel", 128, loads=True, tensor_cores=True),
    Promise("interflow_head_scores_kernel", 128, loads=True, tensor_cores=True),
    Promise("interflow_head_products_kernel", 128, loads=True),
    Promise("interflow_head_epilogue_kernel", 64),
    # NHWC <T, max_pool, wide, mask>, backward <T, max_pool, wide>: three blocks a multiprocessor where accesses are 16 bytes wide, else two
    Promise(r"tap_pixels<\w+, true, true, \w+>", 80, loads=True, stores=True),
    Promise(r"tap_pixels<\w+, false, true, \w+>", 80, loads=True),
    Promise(r"tap_pixels_backward<\w+, \w+, true>", 80, stores=True),
    Promise(r"tap_pixels(_backward)?<\w+, \w+, false(, \w+)?>", 128),
    # NCHW <T, max_pool, path, mask>, backward <T, max_pool, path>; paths 0 wide, 1 narrow, 2 staged: three blocks but for the narrow ones
    Promise(rf"tap_planes<\w+, \w+, {PATH}0, \w+>", 80, loads=True),
    Promise(rf"tap_planes_backward<\w+, \w+, {PATH}0>", 80, stores=True),
    Promise(rf"tap_planes(_backward)?<\w+, \w+, {PATH}2(, \w+)?>", 80, copies=True, stores=True),
    Promise(rf"tap_planes(_backward)?<\w+, \w+, {PATH}1(, \w+)?>", 128),
)
"""Read from the top, the first row whose pattern is found in a kernel's demangled name holds."""


def setup_as_module() -> object:
    """setup.py as a module: its functions, nothing built."""
    spec = importlib.util.spec_from_file_location("interflow_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


SETUP = setup_as_module()
TOOLKIT = SETUP.find_toolkit()
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason="no nvcc in CUDA_HOME, PATH or /usr/local/cuda")


# --- building -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Built:
    library: Path
    folder: Path  # FILE.o and FILE.log of each .cu
    seconds: float


BUILD = """
import runpy, sys
made = runpy.run_path("setup.py")
parts = made["extensions"]()
parts["ext_modules"] = [e for e in parts["ext_modules"] if e.name == "interflow_kernels._cuda"]
made["setup"](script_args=["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[2]], **parts)
"""


@pytest.fixture(scope="session")
def built() -> Built:
    """The CUDA library for every architecture, built as an installation builds it, in build/; what is up to date there stays."""
    if TOOLKIT is None:
        pytest.skip("no nvcc in CUDA_HOME, PATH or /usr/local/cuda")
    folder = ROOT / "build" / "cuda-test"
    environment = {**os.environ, "INTERFLOW_CUDA": "1"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder), str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert f"CUDA kernels on for {' '.join(ARCHITECTURES)}+PTX (INTERFLOW_CUDA=1)" in done.stdout
    assert "warning" not in done.stderr, done.stderr[-4000:]
    return Built(folder / "interflow_kernels/_cuda.abi3.so", folder / "cuda", time.perf_counter() - start)


@pytest.mark.slow
def test_the_library_needs_nothing_but_torch_and_the_system(built):
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("no nm and readelf")
    listed = subprocess.run([nm, "-D", "--undefined-only", built.library], capture_output=True, text=True, check=True).stdout
    undefined = {line.split()[-1] for line in listed.splitlines() if " w " not in line and "@" not in line}
    assert not [name for name in undefined if not name.startswith(("aoti_torch_", "torch_"))], undefined
    exported = subprocess.run([nm, "-D", "--defined-only", built.library], capture_output=True, text=True, check=True).stdout
    assert not re.search(r" cuda[A-Z]| __cuda", exported)  # the runtime inside is nobody else's
    needed = re.findall(r"NEEDED.*\[(.*)\]", subprocess.run([readelf, "-d", built.library], capture_output=True, text=True, check=True).stdout)
    assert "libtorch.so" in needed
    assert not [name for name in needed if "cuda" in name or "cudart" in name]


LOAD = """
import shutil, sys, torch
import interflow_kernels._native as native
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
    operators = sorted({name for f in ROOT.glob("csrc/cuda/*.cpp") for name in re.findall(r'm\.impl\("(\w+)"', f.read_text())})
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


# --- what the compiler made of the kernels --------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def kernels(built) -> list[Kernel]:
    program = disassembler()

    def read(stem: str) -> list[Kernel]:
        return kernels_of((built.folder / f"{stem}.log").read_text(), built.folder / f"{stem}.o", program)

    with ThreadPoolExecutor(2) as pool:
        return [kernel for found in pool.map(read, [file.stem for file in KERNEL_FILES]) for kernel in found]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_their_promises(kernels, architecture):
    mine = [k for k in kernels if k.architecture == architecture]
    assert bool(mine) == bool(KERNEL_FILES)
    found = [text for kernel in mine for text in complaints(kernel, PROMISES)]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_machine_code_was_read(kernels):
    if disassembler() is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton: registers and spills are checked, machine code is not")
    assert all(kernel.count("EXIT") for kernel in kernels)


@pytest.mark.slow
def test_every_row_of_the_table_speaks_of_a_kernel(kernels):
    for promise in PROMISES:
        assert any(re.search(promise.kernel, k.name) for k in kernels), promise


# --- that the checks can fail -----------------------------------------------------------------------------------------------
BAD = {
    "spills": (
        "__global__ void __launch_bounds__(1024, 2) bad(const float* x, float* y) { float v[64]; for (int i = 0; i < 64; ++i) v[i] = x[i * 64 + threadIdx.x];"
        " for (int r = 0; r < 9; ++r) for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + 3) % 64] + v[(i + r) % 64];"
        " for (int i = 0; i < 64; ++i) y[i * 64 + threadIdx.x] = v[i]; }",
        ("spills", "accesses to local memory"),
    ),
    "float_atomic": ("__global__ void __launch_bounds__(256) bad(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }", ("atomics on floating",)),
    "narrow": (
        "__global__ void __launch_bounds__(256) bad(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }",
        ("no 16-byte loads", "no 16-byte stores", "no 16-byte copies into shared memory", "no matrix instructions"),
    ),
    "good": (
        "__global__ void __launch_bounds__(256) bad(const float4* x, float4* y, unsigned* n) { y[threadIdx.x] = x[threadIdx.x]; atomicAdd(n, 1u); }",
        ("no 16-byte copies into shared memory", "no matrix instructions"),
    ),
}


@needs_nvcc
@pytest.mark.parametrize("name", BAD)
def test_a_bad_kernel_is_refused(name, tmp_path):
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton")
    code, expected = BAD[name]
    source, cubin = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    source.write_text(code)
    done = subprocess.run([TOOLKIT.nvcc, "-cubin", "-arch=sm_90", "-Xptxas=-v", "-std=c++20", source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kernel,) = kernels_of(done.stderr, cubin, program)
    found = complaints(kernel, [Promise("bad", 255, loads=True, stores=True, copies=True, tensor_cores=True)])
    for text in expected:
        assert any(text in line for line in found), found
    if name == "good":
        assert len(found) == 2
    assert any("registers" in line for line in complaints(kernel, [Promise("bad", 4)]))
    assert any("no row" in line for line in complaints(kernel, []))


def test_a_copy_to_a_sum_with_a_uniform_register_is_refused():
    """As ptxas writes it for sm_90 where the copy has a cache policy: the code before computes UR10 and UR11."""
    lines = {
        "        /*1690*/                   LDGSTS.E.BYPASS.128 [R20+UR0+0x400], desc[UR1][R18.64] ;  /* 0x0040000012147dae */": "LDGSTS.E.BYPASS.128+UR",
        "        /*1690*/              @!P1 LDGSTS.E.BYPASS.128 [R25+0x810], desc[UR6][R18.64] ;      /* 0x0081000012197fae */": "LDGSTS.E.BYPASS.128",
    }
    for line, opcode in lines.items():
        assert opcode_of(line) == opcode
        found = complaints(Kernel("bad", "90a", opcodes={opcode: 2}), [Promise("bad", 255)])
        assert found == (["bad for sm_90a: 2 copies whose shared address is a sum with a uniform register"] if opcode.endswith("+UR") else [])


def test_float_atomics_by_name():
    from cuda_code import FLOAT_ATOMIC

    for bad in ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD.F16x2.RN.STRONG.GPU", "REDG.E.ADD.F64.RN.STRONG.GPU", "ATOM.E.ADD.BF16_V2"):
        assert re.fullmatch(FLOAT_ATOMIC, bad), bad
    for good in ("RED.E.ADD.STRONG.GPU", "ATOMG.E.ADD.STRONG.GPU", "ATOMG.E.CAS.64.STRONG.GPU", "FADD.F32", "REDUX.SUM"):
        assert not re.fullmatch(FLOAT_ATOMIC, good), good


# --- the source ---------------------------------------------------------------------------------------------------------
def test_kernel_files_keep_to_the_common_language():
    found = [text for f in (*KERNEL_FILES, *sorted(ROOT.glob("csrc/cuda/*.cuh"))) for text in forbidden(f.name, f.read_text())]
    assert not found, "\n".join(found)
    torch_headers = [f.name for f in KERNEL_FILES if re.search(r"#include\s*<torch/", f.read_text())]
    assert not torch_headers


def test_what_the_source_check_finds():
    good = "__global__ void __launch_bounds__(256) k(const __grid_constant__ P p) {} // asm <<< __shared__"
    assert forbidden("a.cu", good) == []
    for bad in ("k<<<1, 2>>>();", "__shared__ int x[4];", 'asm("exit;");', "__global__ void k(P p) {}", "template <class T>\n__global__ void k(P p);"):
        assert len(forbidden("a.cu", bad)) == 1, bad
    assert forbidden("ptx.cuh", 'asm("exit;");') == []


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
        decision = SETUP.decide_cuda(torch_cuda)
        assert (decision.toolkit is not None) == on, (torch_cuda, value)
        assert words in decision.reason
    monkeypatch.setattr(SETUP, "find_toolkit", lambda: None)
    asked()
    assert "no nvcc" in SETUP.decide_cuda(f"{major}.0").reason
    asked(INTERFLOW_CUDA="1")
    with pytest.raises(SystemExit, match="install the CUDA toolkit or set CUDA_HOME"):
        SETUP.decide_cuda(None)


@needs_nvcc
def test_architectures(capsys):
    assert SETUP.architectures(TOOLKIT, "8.0;9.0a 12.0+PTX") == (("80", "90a", "120"), "120")
    assert SETUP.architectures(TOOLKIT, "7.5 8.6") == (("86",), None)
    assert "7.5" in capsys.readouterr().out
    chosen = SETUP.Cuda(TOOLKIT, "", *SETUP.architectures(TOOLKIT, ""))
    assert chosen.listed() == " ".join(ARCHITECTURES) + "+PTX"
    assert chosen.gencodes()[3:] == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_120,code=[sm_120,compute_120]",
    ]
    older = SETUP.Toolkit("nvcc", (12, 4), [], [], frozenset({80, 86, 89, 90}))
    assert SETUP.architectures(older, "") == (("80", "86", "89", "90a"), "90a")


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
        SETUP.jobs() and SETUP.decide_cuda(None)
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_log_is_read():
    log = """ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers"""
    assert parse_log(log) == [Kernel("_Z3badv", "90a", 40, 8, 28)]


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
