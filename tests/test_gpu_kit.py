"""What lets compiled libraries travel: symbols of torch 2.10 alone, what is known of their build for any Python, and the folder of `make gpu-kit`."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bench_modules import room

import interflow_kernels
from interflow_kernels import _native

ROOT = Path(__file__).parent.parent
KIT = ROOT / "build/gpu-kit"
OF_2_10 = {line for line in (ROOT / "tests/torch_2_10_symbols.txt").read_text().splitlines() if not line.startswith("#")}
kit = room("gpu.kit")
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="no nm (binutils)")


# --- symbols ----------------------------------------------------------------------------------------------------------------
def built(stem: str) -> list[Path]:
    """The library of this name wherever it was built: in place, for the tests of the CUDA build, into the kit."""
    folders = (ROOT / "interflow_kernels", ROOT / "build/cuda-test/interflow_kernels", KIT / "interflow_kernels")
    return [path for folder in folders for path in sorted(folder.glob(f"{stem}.*so"))]


def not_of_2_10(library: Path) -> set[str]:
    """What the library takes from torch and torch 2.10 does not give. Symbols with a version are the system's."""
    return {symbol for symbol in kit.undefined(library) if "@" not in symbol} - OF_2_10


@needs_nm
@pytest.mark.parametrize("stem", ["_cpu", "_cuda"])
def test_the_libraries_need_nothing_that_torch_2_10_lacks(stem):
    found = built(stem)
    if not found:
        pytest.skip(f"{stem} was not built here (INTERFLOW_CUDA=1, make gpu-kit)")
    for library in found:
        assert not_of_2_10(library) == set(), library
        assert kit.glibc_needed(kit.undefined(library)) <= kit.OLDEST_GLIBC, library


@needs_nm
def test_a_newer_symbol_is_found(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "x.so"
    code = "int torch_of_the_future(void); int aoti_torch_get_dim(void*, long*); int f(void) { return torch_of_the_future() + aoti_torch_get_dim(0, 0); }"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=code, text=True, check=True)
    assert not_of_2_10(library) == {"torch_of_the_future"}
    assert kit.glibc_needed({"malloc@GLIBC_2.2.5", "x@GLIBC_2.32", "aoti_torch_get_dim", "y@GLIBCXX_3.4.29"}) == (2, 32)
    assert len(OF_2_10) > 150 and {"aoti_torch_get_current_cuda_stream", "torch_call_dispatcher"} <= OF_2_10


# --- what is known of the build ---------------------------------------------------------------------------------------------
ABOUT = {"compiler": "gcc", "torch": "2.13.0", "stable_abi": "2.10", "cuda": "13.0", "cuda_architectures": "80 90a", "cuda_reason": "INTERFLOW_CUDA=1"}


@pytest.fixture
def folder(tmp_path):
    """A folder with the CPU library and what is known of a build, as a kit has them."""
    library = _native.library_path("_cpu")
    if library is None:
        pytest.skip("nothing was compiled here")
    shutil.copy(library, tmp_path)
    (tmp_path / "build_info.json").write_text(json.dumps({**ABOUT, "cpu_kernels": ["baseline", "avx2"], "commit": "x", "sources": "y"}))
    return tmp_path


def python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_libraries_may_lie_elsewhere_and_need_no_module(folder):
    """As under a Python that _C is not built for."""
    code = "import sys; sys.modules['interflow_kernels._C'] = None\n"
    code += "import torch; from interflow_kernels import _native, backend, stage_tap\n"
    code += "with backend('native'): assert stage_tap(torch.ones(1, 1, 2, 2))[1].item() == 1\n"
    code += "print(_native.library_path('_cpu').parent, _native.build_info()['cuda_architectures'], isinstance(_native.build_info()['has_avx2'], bool))"
    assert python(code, INTERFLOW_LIBRARIES=str(folder)) == f"{folder} 80 90a True"
    report = python("from interflow_kernels.info import report; print(report())", INTERFLOW_LIBRARIES=str(folder))
    assert "gcc, against torch 2.13.0, stable ABI 2.10" in report and f"in {folder} (INTERFLOW_LIBRARIES)" in report
    assert "built by CUDA 13.0 for 80 90a" in report


def test_a_folder_without_the_library_is_named(tmp_path):
    said = python("from interflow_kernels import _native; print(_native.cpu_error)", INTERFLOW_LIBRARIES=str(tmp_path))
    assert f"_cpu is missing from the folder that INTERFLOW_LIBRARIES names, {tmp_path}; reinstall" in said and "\n" not in said


def test_a_library_of_other_sources_is_one_sentence(tmp_path):
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", tmp_path / "_cpu.abi3.so"], input="int x;", text=True, check=True)
    said = python("from interflow_kernels import _native; print(_native.cpu_error)", INTERFLOW_LIBRARIES=str(tmp_path))
    assert said.startswith("the compiled library does not load into torch") and "undefined symbol" in said and "\n" not in said


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The package's files as they would lie where _C is for another Python."""
    (tmp_path / "_C.cpython-399-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    monkeypatch.setattr(_native, "libraries", tmp_path)
    monkeypatch.setitem(sys.modules, "interflow_kernels._C", None)  # its import fails, as it does there
    monkeypatch.delattr(interflow_kernels, "_C", raising=False)  # where another test has imported it
    return tmp_path


def test_a_module_of_another_python_is_one_sentence(elsewhere, monkeypatch):
    from interflow_kernels import info

    said = _native.python_error()
    assert "build_info.json is missing and _C was built for another Python (_C.cpython-399" in said and "reinstall with" in said and "\n" not in said
    assert said in info.report()
    monkeypatch.setattr(_native.torch.version, "cuda", "13.0")
    assert said in _native._load_cuda()
    (elsewhere / "build_info.json").write_text(json.dumps({**ABOUT, "cpu_kernels": ["baseline"]}))
    said = _native.python_error()
    assert said.startswith("_C was built for another Python (") and said.endswith("; the kernels do not need it") and said in info.report()
    (elsewhere / "build_info.json").write_text("{")  # cut short
    assert _native.build_info() is None


def test_a_module_of_this_python_is_none():
    assert _native.python_error() is None


def test_the_build_writes_what_the_module_says(tmp_path):
    module = next((ROOT / "interflow_kernels").glob("_C.*so"), None)
    if module is None:
        pytest.skip("nothing was compiled here")
    spec = importlib.util.spec_from_file_location("interflow_setup_of_kit", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = setup
    spec.loader.exec_module(setup)
    setup.write_information(Path(shutil.copy(module, tmp_path)))
    written = json.loads((tmp_path / "build_info.json").read_text())
    from interflow_kernels import _C

    assert {key: tuple(value) if isinstance(value, list) else value for key, value in written.items() if key in _C.build_info()} == _C.build_info()
    assert written["python"] == sys.implementation.cache_tag and len(written["sources"]) == 16 and written["sources"] == setup.digest()


# --- the kit ----------------------------------------------------------------------------------------------------------------
def test_the_package_is_copied_without_what_is_compiled(tmp_path):
    kit.copied("interflow_kernels", ROOT / "interflow_kernels", tmp_path)
    kit.copied("interflow_vision", ROOT / "python/interflow_vision", tmp_path)
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"interflow_kernels/triton/stage_tap/forward.py", "interflow_kernels/py.typed", "interflow_vision/__init__.py"} <= names
    assert any(name.startswith("interflow_vision/") and name.endswith(".yaml") for name in names)
    assert not any(name.endswith((".so", ".pyc", ".json")) for name in names)


def test_a_kit_that_is_there_runs_and_is_small():
    if not (KIT / "interflow_kernels/build_info.json").exists():
        pytest.skip("no kit here, `make gpu-kit` makes it")
    assert sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file()) < kit.MOST
    environment = {key: value for key, value in os.environ.items() if key != "INTERFLOW_LIBRARIES"}
    done = subprocess.run([sys.executable, "-c", kit.USE], capture_output=True, text=True, cwd=KIT, env={**environment, "PYTHONPATH": str(KIT)})
    assert done.stdout.strip() == str(KIT / "interflow_kernels/__init__.py"), done.stderr[-3000:]
    assert not list(KIT.rglob("_C.*"))
