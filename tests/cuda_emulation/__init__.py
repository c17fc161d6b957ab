"""Builds CUDA sources for the host emulation, loads them as a torch library, and runs them with a chosen number of blocks and order.

    operators = load(operator_sources())        # the whole CUDA part: torch.ops.interflow_emulated
    with emulated(operators, blocks=7, seed=3):
        operators.ops.stage_tap(u, None, True, True)

A fault (race, deadlock, missing barrier, access outside of tensors, unwritten value, counters that stay dirty) is a RuntimeError of the
operator's launch. `load(sources, edits=[Edit(file, old, new)])` builds a mutant, a library of its own, to show that a mistake is caught.

What is not emulated: time, caches (load_stream aside), partial warps' masks, textures, clusters, asynchronous copies, more than one dimension.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
KERNEL_FLAGS = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
CHECKED = ("memcpy", "memmove", "memset")
ASAN_FLAGS = ["-fsanitize=address", "-fno-omit-frame-pointer"]


@dataclass(frozen=True)
class Edit:
    """One change of a source file: `old` must be there exactly once."""

    file: str
    old: str
    new: str


def operator_sources() -> list[Path]:
    return sorted([ROOT / "csrc/library.cpp", *(ROOT / "csrc/cuda").glob("*.cpp"), *(ROOT / "csrc/cuda").glob("*.cu")])


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def cuda_include() -> Path | None:
    """NVIDIA's headers: of the nvcc on PATH (which may be a script that calls the real one), of CUDA_HOME, or in the usual place."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.insert(0, str(Path(nvcc).resolve().parent.parent))
    return next((Path(root) / "include" for root in roots if root and (Path(root) / "include/cuda_bf16.h").exists()), None)


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler (CXX, g++)"
    if cuda_include() is None:
        return "no CUDA headers (nvcc on PATH, CUDA_HOME, /usr/local/cuda)"
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("INTERFLOW_EMULATION_CACHE", Path(tempfile.gettempdir()) / f"interflow-emulation-{os.getuid()}"))


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-6000:]}")
    return done.stdout


def folders_of(sources: Sequence[Path]) -> list[Path]:
    """Whose files a build reads: csrc, and the folders of sources elsewhere."""
    folders = [ROOT / "csrc", HERE]
    folders += [s.parent for s in sources if not any(f in s.parents for f in folders)]
    return list(dict.fromkeys(folders))


def edited(sources: Sequence[Path], edits: Sequence[Edit], into: Path) -> tuple[Path, list[Path]]:
    """A copy of the project's sources with the edits: its root and the sources in it."""
    for folder in folders_of(sources):
        shutil.copytree(folder, into / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for edit in edits:
        path = into / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file}: the text to edit is there {text.count(edit.old)} times, not once: {edit.old!r}")
        path.write_text(text.replace(edit.old, edit.new))
    return into, [into / s.relative_to(ROOT) for s in sources]


def compile_object(source: Path, root: Path, library: str, asan: bool) -> Path:
    """One object file, found in the cache if the same preprocessed text was compiled with the same flags before."""
    kernel = source.suffix == ".cu"
    include = [root / "csrc", root / "csrc/cuda", root / "tests/cuda_emulation"]
    system = [cuda_include(), Path(torch.__file__).parent / "include"]
    defines = {"INTERFLOW_EMULATION": 1, "INTERFLOW_EMULATION_ASAN": int(asan), "INTERFLOW_LIBRARY": library, "INTERFLOW_KEY": "CPU"}
    base = [compiler(), "-x", "c++", "-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off"]
    base += ["-fno-strict-aliasing", "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", f"-ffile-prefix-map={root}/=", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    base += [f"-D{name}={value}" for name, value in defines.items()] + [f"-I{f}" for f in include]
    for folder in system:
        base += ["-isystem", str(folder)]
    flags = ASAN_FLAGS if asan else KERNEL_FLAGS if kernel else []
    text = run([*base, "-E", source]).replace(f"{root}/", "")
    key = hashlib.sha256("\0".join([text, *map(str, base[:14]), *flags]).encode()).hexdigest()[:24]
    target = cache_folder() / f"{source.stem}-{key}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / "made.o"
            run([*base, *flags, "-c", source, "-o", made])
            if kernel and not asan:
                run(["objcopy", *(f"--redefine-sym={name}=interflow_checked_{name}" for name in CHECKED), made])
            made.replace(target)
    return target


@functools.cache
def build(sources: tuple[Path, ...], edits: tuple[Edit, ...] = (), asan: bool = False) -> tuple[Path, str]:
    """The shared library and the name of the torch library in it."""
    if reason := why_not():
        raise RuntimeError(f"the CUDA emulation cannot be built: {reason}")
    cache_folder().mkdir(parents=True, exist_ok=True)
    # Two libraries with operators cannot share a name in one process.
    outside = [s.stem for s in sources if ROOT / "csrc" not in s.parents]
    library = "interflow_emulated" + "".join(f"_{re.sub(r'[^a-z0-9]', '_', stem)}" for stem in outside[:1])
    if edits:
        library += "_" + hashlib.sha256(repr(edits).encode()).hexdigest()[:10]
    with tempfile.TemporaryDirectory() as folder:
        root, moved = edited(sources, edits, Path(folder)) if edits else (ROOT, list(sources))
        runtime = sorted((root / "tests/cuda_emulation").glob("*.cpp"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda s: compile_object(s, root, library, asan), [*moved, *runtime]))
    key = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:24]
    target = cache_folder() / f"{library}-{key}.so"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        torch_lib = Path(torch.__file__).parent / "lib"
        run([compiler(), "-shared", *(ASAN_FLAGS if asan else []), *objects, f"-L{torch_lib}", "-ltorch_cpu", "-ldl", "-o", made])
        made.replace(target)
    return target, library


@functools.cache
def load_library(path: Path, library: str) -> SimpleNamespace:
    torch.ops.load_library(str(path))
    return SimpleNamespace(ops=getattr(torch.ops, library), control=ctypes.CDLL(str(path)), path=path)


def load(sources: Sequence[Path], edits: Sequence[Edit] = (), asan: bool = False) -> SimpleNamespace:
    """A built library: .ops are its operators on CPU tensors."""
    return load_library(*build(tuple(sources), tuple(edits), asan))


@contextlib.contextmanager
def emulated(library: SimpleNamespace, blocks: int = 7, seed: int = 0) -> Iterator[None]:
    """How many blocks run at once, and the order in which they do."""
    library.control.interflow_emulation_set(ctypes.c_int64(blocks), ctypes.c_uint64(seed))
    yield


def launches(library: SimpleNamespace) -> int:
    """How many launches the library has run."""
    library.control.interflow_emulation_launches.restype = ctypes.c_int64
    return library.control.interflow_emulation_launches()
