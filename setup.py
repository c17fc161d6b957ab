"""Builds the compiled part of interflow-kernels; everything else is in pyproject.toml.

_C     pybind11 module: build information. A translation unit of its own, without torch headers.
_cpu   operator schemas and CPU kernels over torch's stable ABI: one binary for every torch >= 2.10, loaded by torch.ops.
_cuda  the CUDA kernels over the same ABI; the CUDA runtime is inside. Loaded beside _cpu where torch is a CUDA build.
build_info.json, beside them, says what _C says: for a Python that _C is not built for.

INTERFLOW_NATIVE=0       no compiled part: the package then runs in plain PyTorch.
INTERFLOW_CUDA=1 or 0    with or without _cuda. By default with it where nvcc is found and torch is a CUDA build; whether the building
                         machine has a GPU never matters. nvcc is looked for in CUDA_HOME, PATH and /usr/local/cuda.
TORCH_CUDA_ARCH_LIST     for which GPUs, e.g. "8.0 9.0a 12.0+PTX"; see ARCHITECTURES.
MAX_JOBS                 limits the compiler processes.
SOURCE_DATE_EPOCH        the time, in seconds since 1970, of every file in wheel and source archive; see reproducible.py.
"""

import importlib.util
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not look beside setup.py
from cuda_build import compile_kernels, decide_cuda, digest, jobs, output_of, sources, switch  # noqa: E402
from old_glibc import for_old_systems  # noqa: E402
from reproducible import COMMANDS, compiler_flags, set_time  # noqa: E402

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
OLD_SYSTEMS = "csrc/common/old_systems.cpp"  # with old_glibc.h and old_glibc.py: no library needs a newer system than manylinux_2_28
FLAGS = ["-include", str(ROOT / "csrc/common/old_glibc.h"), "-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wno-psabi"]


def native_is_wanted() -> bool:
    """Whether the compiled part is built: on Linux, unless INTERFLOW_NATIVE=0."""
    asked = switch("INTERFLOW_NATIVE") or ("1" if platform.system() == "Linux" else "0")
    print(f"interflow-kernels: compiled part {'on' if asked == '1' else 'off'} (INTERFLOW_NATIVE, {platform.system()} {platform.machine()})")
    return asked == "1"


def write_information(module: Path) -> None:
    """build_info.json beside the built module _C: what it says, for which Python it is, and of which sources."""
    spec = importlib.util.spec_from_file_location("interflow_kernels._C", module)
    assert spec is not None and spec.loader is not None
    built = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(built)
    try:
        commit = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD").strip()[:10]
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    about = {"python": sys.implementation.cache_tag, "machine": platform.machine(), "commit": commit, "sources": digest()}
    (module.parent / "build_info.json").write_text(json.dumps({**built.build_info(), **about}, indent=1) + "\n")


def package_version() -> str:
    found = re.search(r'__version__ = "(.+)"', (ROOT / "interflow_kernels/_version.py").read_text())
    assert found is not None
    return found[1]


def namespace() -> str:
    """Of the operators, as interflow_kernels/_namespace.py fixes it."""
    found = re.search(r'^NAMESPACE = "(\w+)"$', (ROOT / "interflow_kernels/_namespace.py").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def extensions() -> dict:
    try:
        import pybind11
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"interflow-kernels: {error}. With --no-build-isolation, install the build requirements first: pip install torch setuptools ninja pybind11"
        ) from None
    jobs()  # a wrong MAX_JOBS is told before anything is compiled
    cuda = decide_cuda(torch.version.cuda)
    print(f"interflow-kernels: CUDA kernels {'on for ' + cuda.listed() if cuda.toolkit else 'off'} ({cuda.reason})")
    # The stable headers are included as system headers would be: only our own warnings are ours to mend.
    flags = [*FLAGS, *compiler_flags(ROOT, Path(torch.__file__).parent)]
    information = {
        "INTERFLOW_TORCH_VERSION": torch.__version__,
        "INTERFLOW_STABLE_ABI": "2.10",
        "INTERFLOW_CUDA_VERSION": "{}.{}".format(*cuda.toolkit.version) if cuda.toolkit else "",
        "INTERFLOW_CUDA_ARCHITECTURES": cuda.listed(),
        "INTERFLOW_CUDA_REASON": cuda.reason,
    }
    module = CppExtension(
        "interflow_kernels._C",
        ["csrc/bindings.cpp", OLD_SYSTEMS],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        extra_compile_args=[*flags, *(f'-D{name}="{value}"' for name, value in information.items())],
        depends=["setup.py"],
    )
    module.libraries = []  # no torch in it
    names = [f'-DINTERFLOW_VERSION="{package_version()}"', f"-DINTERFLOW_LIBRARY={namespace()}"]
    library = CppExtension(
        "interflow_kernels._cpu",
        [*sources("csrc/library.cpp", "csrc/*/cpu/*.cpp"), OLD_SYSTEMS],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*flags, STABLE_ABI, *names],
        py_limited_api=True,
        depends=sources("csrc/**/*.h"),
    )
    library.libraries = ["torch_cpu", "dl"]
    built = [module, library]
    kernels = sources("csrc/*/cuda/*.cu")
    if cuda.toolkit is not None:
        device = CppExtension(
            "interflow_kernels._cuda",
            [*sources("csrc/*/cuda/*.cpp"), OLD_SYSTEMS],
            include_dirs=[str(ROOT / "csrc"), *cuda.toolkit.includes],
            library_dirs=[*cuda.toolkit.libraries, str(Path(torch.__file__).parent / "lib")],
            extra_compile_args=[*flags, STABLE_ABI, *names, "-DUSE_CUDA"],
            # torch's current stream is a function of libtorch_cuda, which a CPU build of torch does not have: libtorch, which both have, brings it along.
            extra_link_args=["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"],
            py_limited_api=True,
            depends=["setup.py", "cuda_build.py", "old_glibc.py", *kernels, *sources("csrc/**/*.h", "csrc/**/*.cuh")],
        )
        device.libraries = ["torch_cpu", "cudart_static", "dl", "rt", "pthread"]
        built.append(device)

    class Build(BuildExtension):
        """torch's, with nvcc run by ourselves: torch finds none where it was built without CUDA."""

        def run(self):
            super().run()
            if any(extension.name == module.name for extension in self.extensions):
                write_information(Path(self.get_ext_fullpath(module.name)))

        def build_extension(self, extension):
            if extension.name == "interflow_kernels._cuda":
                folder = Path(self.build_temp).resolve() / "cuda"
                extension.extra_objects = compile_kernels(cuda, kernels, folder)
                runtime = next(path for each in cuda.toolkit.libraries for path in [Path(each) / "libcudart_static.a"] if path.exists())
                extension.library_dirs.insert(0, str(for_old_systems(runtime, folder).parent))
            super().build_extension(extension)

    return {"ext_modules": built, "cmdclass": {**COMMANDS, "build_ext": Build.with_options(no_python_abi_suffix=False)}}


if __name__ == "__main__":
    set_time()
    setup(**(extensions() if native_is_wanted() else {"cmdclass": COMMANDS}))
