"""The folder for Hugging Face's `kernels`: built, loaded from the disk beside the installed package, each with operators of its own."""

import base64
import hashlib
import importlib.util
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("hub", ROOT / "bench/hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def torch_version():
    return "".join(torch.__version__.split(".")[:2])


def test_names(hub):
    machine = platform.machine()
    assert hub.variants("cpu")[0] == f"torch210-cxx11-cpu-{machine}-linux"
    assert hub.variants("cuda", "13.0")[-1] == f"torch214-cxx11-cu130-{machine}-linux"
    assert torch_version() in hub.TORCH
    first, second = hub.kernel_id("cpu"), hub.kernel_id("cuda")
    assert first != second and first.isidentifier() and first.startswith("_interflow_kernels_cpu_")


def test_the_namespace_is_written_in_one_place(hub, tmp_path):
    """No other file of the package names it where Python or C++ would register under it or call it."""
    hub.copy_of_sources(tmp_path / "sources", "another_namespace")
    assert 'NAMESPACE = "another_namespace"' in (tmp_path / "sources/interflow_kernels/_namespace.py").read_text()
    for path in sorted((tmp_path / "sources").rglob("*.py")):
        text = path.read_text()
        assert "torch.ops.interflow_kernels" not in text and '"interflow_kernels::' not in text, path
    for path in sorted((tmp_path / "sources/csrc").rglob("*.cpp")):
        assert "LIBRARY_IMPL(interflow_kernels" not in path.read_text(), path


def test_architectures_of_the_metadata(hub, tmp_path):
    (tmp_path / "a.py").write_text("x")
    about = hub.metadata(tmp_path, "cuda", "an_id", {"cuda_architectures": "80 90a 120+PTX"})
    assert about["backend"] == {"type": "cuda", "archs": ["8.0", "9.0", "12.0+PTX"]}
    assert about["digest"]["files"] == {"a.py": base64.b64encode(hashlib.sha256(b"x").digest()).decode()}


BESIDE = """
import importlib.util, json, sys
from pathlib import Path
import torch, interflow_kernels as installed

def loaded(name, path):  # as `kernels` does it
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

def check(ours, theirs):
    assert theirs is not ours and theirs.FusedInterflowHead is not ours.FusedInterflowHead
    maps = [torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 4, 2, 2, requires_grad=True)]
    head = ours.FusedInterflowHead((3, 4), 5, "gated")
    other = theirs.FusedInterflowHead((3, 4), 5, "gated")
    other.load_state_dict(head.state_dict())
    results = []
    for module, package in ((head, ours), (other, theirs)):
        with package.backend("native"):
            y = module(maps)
            m, p = package.stage_tap(maps[0])
        results.append([y, m, p, *torch.autograd.grad(y.sum() + p.sum() + m.sum(), maps)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    x = [x.detach() for x in maps]
    compiled = torch.compile(lambda a, b: (head([a, b]), other([a, b])), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert all(map(torch.equal, *[compiled(*x)] * 2))

folder = Path(sys.argv[1])
identity = json.loads((folder / "metadata.json").read_text())["id"]
if sys.argv[2] == "kernels":
    from kernels import get_local_kernel
    hub = get_local_kernel(Path(sys.argv[3]))
elif sys.argv[2] == "older":
    hub = loaded("older", folder / "interflow_kernels" / "__init__.py")
else:
    hub = loaded(identity, folder / "__init__.py")
check(installed, hub)
assert hub.__all__ == installed.__all__
assert hasattr(getattr(torch.ops, identity), "interflow_head")
print("done")
"""


@pytest.mark.slow
def test_a_local_folder_is_loaded_beside_the_installed_package(hub, tmp_path):
    """By hand as `kernels` does it, as its older versions did, and by itself where it is installed."""
    made = hub.make(tmp_path / "hub", only=torch_version())
    (variant,) = (made / "build").iterdir()
    about = json.loads((variant / "metadata.json").read_text())
    assert about["backend"] == {"type": "cpu"}
    assert f'NAMESPACE = "{about["id"]}"' in (variant / "_namespace.py").read_text()
    for name, digest in about["digest"]["files"].items():
        assert base64.b64encode(hashlib.sha256((variant / name).read_bytes()).digest()).decode() == digest
    assert {"__init__.py", "_cpu.abi3.so", "build_info.json", "interflow_kernels/__init__.py"} <= set(about["digest"]["files"])
    assert not list(variant.glob("_C.*"))
    for way in ("by hand", "older", *(["kernels"] if importlib.util.find_spec("kernels") else [])):
        done = subprocess.run([sys.executable, "-c", BESIDE, variant, way, made], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.strip() == "done"
