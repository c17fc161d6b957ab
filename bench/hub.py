"""`make hub`: the package as a kernel for Hugging Face's `kernels`, a folder to load locally or to put on the Hub.

    build/hub/build.toml                        name, version, backends, where the sources lie
    build/hub/build/<variant>/                  for one torch, backend and machine: the package, its libraries, metadata.json
    build/hub/build/<variant>/<package>/        the same under the package's name, for older versions of `kernels`

The operators of such a copy are registered under a name of its own, the "id" of metadata.json, which interflow_kernels/_namespace.py and the libraries
built beside it hold: copies of several versions, and an installed package, live side by side in one process. The stable ABI makes one library
serve every torch >= 2.10, so the variants of one backend have the same files.
"""

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HUB = ROOT / "build/hub"
NAME = "interflow_kernels"
TORCH = ("210", "211", "212", "213", "214")
"""Versions of torch that a variant is written for."""
VERSION = 0
"""Of the kernel on the Hub: 0 until its interface is settled."""
SOURCES = ("csrc", "interflow_kernels", "setup.py", "cuda_build.py", "old_glibc.py", "reproducible.py", "pyproject.toml", "README.md")

COMPATIBILITY = '''"""The package in the folder above, under its own name: where older versions of `kernels` look for it."""

import importlib.util
import sys
from pathlib import Path

_folder = Path(__file__).parent.parent
_name = f"{{__name__.replace('.', '_')}}_{name}"
_spec = importlib.util.spec_from_file_location(_name, _folder / "__init__.py", submodule_search_locations=[str(_folder)])
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''

BUILD_TOML = """# Read by kernel-builder and by people; `make hub` of the source repository wrote this folder.
[general]
name = "interflow-kernels"
version = {version}
edition = 5
license = "Apache-2.0"
backends = [{backends}]

[torch]
src = ["csrc/library.cpp"]

[torch.stable-abi]
{abi}
"""


def kernel_id(backend: str) -> str:
    """The name of this version of the sources: of the operators' namespace and of the module."""
    found = hashlib.sha1()
    for path in sorted([*ROOT.glob("csrc/**/*.[ch]*"), *ROOT.glob("interflow_kernels/**/*.py")]):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return f"_{NAME}_{backend}_{found.hexdigest()[:10]}"


def copy_of_sources(into: Path, namespace: str) -> None:
    """What a build needs, with another namespace."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "build_info.json"))
        else:
            shutil.copyfile(ROOT / name, into / name)
    path = into / "interflow_kernels/_namespace.py"
    text, count = re.subn(r'^NAMESPACE = "\w+"$', f'NAMESPACE = "{namespace}"', path.read_text(), flags=re.MULTILINE)
    assert count == 1, path
    path.write_text(text)


def built(backend: str, namespace: str, temporary: Path) -> Path:
    """The package of one backend with its libraries, built under a namespace; its folder."""
    sources = temporary / f"sources-{backend}"
    copy_of_sources(sources, namespace)
    words = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--build-temp", str(temporary / f"objects-{backend}")]
    environment = {**os.environ, "INTERFLOW_CUDA": "1" if backend == "cuda" else "0", "INTERFLOW_NATIVE": "1"}
    subprocess.run(words, cwd=sources, check=True, env=environment)
    package = sources / NAME
    for module in package.glob("_C.*"):
        module.unlink()  # for this Python alone
    return package


def variants(backend: str, toolkit: str = "") -> list[str]:
    """Names of the folders, as `kernels` looks for them: torch213-cxx11-cpu-x86_64-linux. toolkit: "13.0" for CUDA."""
    device = f"cu{toolkit.replace('.', '')}" if backend == "cuda" else backend
    return [f"torch{version}-cxx11-{device}-{platform.machine()}-linux" for version in TORCH]


def metadata(folder: Path, backend: str, identity: str, built_for: dict[str, str]) -> dict[str, object]:
    """What `kernels` reads before it loads the package in a folder."""
    device: dict[str, object] = {"type": backend}
    if backend == "cuda":
        device["archs"] = [re.sub(r"^(\d+)(\d)a?", r"\1.\2", word) for word in built_for["cuda_architectures"].split()]  # "90a 120+PTX": 9.0 12.0+PTX
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "metadata.json")
    digests = {str(path.relative_to(folder)): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode() for path in files}
    return {
        "id": identity,
        "name": NAME.replace("_", "-"),
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": device,
        "digest": {"algorithm": "sha256", "files": digests},
    }


def make(folder: Path = HUB, backends: tuple[str, ...] = ("cpu",), only: str | None = None) -> Path:
    """Builds the folder anew. only: one version of torch, such as "213", instead of all."""
    shutil.rmtree(folder, ignore_errors=True)
    for backend in backends:
        identity = kernel_id(backend)  # once: sources may change while they are compiled
        package = built(backend, identity, folder.parent / f"{folder.name}-temp")
        about = json.loads((package / "build_info.json").read_text())
        for variant in variants(backend, about["cuda"]):
            if only is not None and not variant.startswith(f"torch{only}-"):
                continue
            target = folder / "build" / variant
            shutil.copytree(package, target, ignore=shutil.ignore_patterns("__pycache__"))
            (target / NAME).mkdir()
            (target / NAME / "__init__.py").write_text(COMPATIBILITY.format(name=identity))
            (target / "metadata.json").write_text(json.dumps(metadata(target, backend, identity, about), indent=1) + "\n")
            print(target)
    quoted = ", ".join(f'"{backend}"' for backend in backends)
    abi = "\n".join(f'{backend} = "2.10"' for backend in backends)
    (folder / "build.toml").write_text(BUILD_TOML.format(version=VERSION, backends=quoted, abi=abi))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make hub", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--backends", nargs="+", default=["cpu"], choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=HUB)
    parser.add_argument("--torch", choices=TORCH, help="for one version of torch alone")
    given = parser.parse_args()
    make(given.out.resolve(), tuple(given.backends), given.torch)
