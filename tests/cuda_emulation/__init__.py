"""Builds CUDA sources for the host emulation, loads them as a torch library, and runs them with a chosen number of blocks and order.

    library = load(operator_sources())           # the whole CUDA part, on CPU tensors
    with emulated(library, blocks=7, seed=3):
        library.ops.stage_tap(u, None, True, True)

A fault ends the launch and is a RuntimeError of the operator, which names kernel, block, thread, tensor and source lines:
  a race between two threads, of one block (no barrier) or of two (no release and acquire), whichever came first this time;
  a read of what nobody has written, an access outside of every tensor, a misaligned vector, a write to an input;
  a read of what an asynchronous copy brings before it was waited for, by another thread before a barrier, a copy over what is still read;
  a barrier or warp operation that not all threads reach, or where they meet in different ones; a deadlock; counters that stay dirty.

    mutant = load(operator_sources(), [Edit("csrc/NAME/cuda/x.cu", "  __syncthreads();  // sums are there\\n", "")])
    assert_caught(mutant, lambda ops: ops.stage_tap(u, None, True, True), "no barrier orders the two")

A new function of ptx.cuh needs a twin in emulation.h; one that lanes do together, a body in warp.cpp.
Not emulated: time, caches (but load_stream may not read what the launch writes), masks of parts of a warp, asynchronous copies other than
copy_async (bulk copies, groups: a wait is for all that a thread has begun), clusters, more than one dimension of blocks and threads. An order
that does not happen for the seeds that were run may still hide a fault: a grid of one block shows waiting in the wrong order, more blocks show
missing releases.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAME = "interflow_emulated"
FLAGS = ["-std=c++20", "-O1", "-g1", "-gdwarf-4", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall"]
FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-DINTERFLOW_EMULATION=1", f"-DINTERFLOW_LIBRARY={NAME}", "-DINTERFLOW_KEY=CPU"]
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
    return sorted([ROOT / "csrc/library.cpp", *ROOT.glob("csrc/*/cuda/*.cpp"), *ROOT.glob("csrc/*/cuda/*.cu")])


def sources(*names: str) -> list[Path]:
    """Files of csrc/ by their paths there, for a library of one operator's one pass."""
    return [ROOT / "csrc" / name for name in names]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.cache
def cuda_headers() -> tuple[Path, ...]:
    """NVIDIA's headers, the folders to search: those of an nvcc, CUDA_HOME, the usual place, or what triton brings along."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        roots.insert(0, str(Path(nvcc).resolve().parent.parent))
    if triton := importlib.util.find_spec("triton"):
        roots += [f"{place}/backends/nvidia" for place in triton.submodule_search_locations or ()]
    for root in filter(None, roots):
        include = Path(root) / "include"
        if (include / "cuda_bf16.h").exists():
            return include, *(f for f in (include / "cccl", HERE / "fallback") if f.exists())
    return ()


def why_not() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler (CXX, g++)"
    if not cuda_headers():
        return "no CUDA headers (nvcc on PATH, CUDA_HOME, /usr/local/cuda, triton)"
    return None


def cache_folder() -> Path:
    return Path(os.environ.get("INTERFLOW_EMULATION_CACHE", Path(tempfile.gettempdir()) / f"interflow-emulation-{os.getuid()}"))


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:6000]}")
    return done.stdout


def edited(sources: Sequence[Path], edits: Sequence[Edit], root: Path) -> None:
    """Copies the project's sources to another root and makes the edits there."""
    for folder in {ROOT / "csrc", HERE, *(s.parent for s in sources)}:
        shutil.copytree(folder, root / folder.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for edit in edits:
        path = root / edit.file
        text = path.read_text()
        if text.count(edit.old) != 1:
            raise ValueError(f"{edit.file}: the text to edit is there {text.count(edit.old)} times, not once: {edit.old!r}")
        path.write_text(text.replace(edit.old, edit.new))


@functools.cache
def compile_object(source: Path, asan: bool, root: Path = ROOT) -> Path:
    """The object file of a source (its path below the root), from the cache if the same preprocessed text was compiled before."""
    kernel, runtime = source.suffix == ".cu", HERE.relative_to(ROOT) == source.parent
    flags = [*FLAGS, *((ASAN_FLAGS if asan else KERNEL_FLAGS) if kernel else ())]
    flags += [f"-DINTERFLOW_EMULATION_ASAN={int(asan)}"] if runtime else []  # the host side is the same for both
    places = [f"-I{root / folder}" for folder in ("csrc", "tests/cuda_emulation")]
    places += [f"-isystem{folder}" for folder in (*cuda_headers(), Path(torch.__file__).parent / "include")]
    command = [compiler(), "-x", "c++", *flags, f"-ffile-prefix-map={root}/=", *places, root / source]
    text = run([*command, "-E"]).replace(f"{root}/", "")
    target = cache_folder() / f"{source.stem}-{digest(compiler(), *flags, text)}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            made = Path(folder) / "made.o"
            run([*command, "-c", "-o", made])
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
    paths = [s.relative_to(ROOT) for s in (*sources, *sorted(HERE.glob("*.cpp")))]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        root = ROOT
        if edits:
            root = Path(folder)
            edited(sources, edits, root)
        # An edit of a header may change any source, that of a source only itself.
        headers = any(not edit.file.endswith((".cu", ".cpp")) for edit in edits)
        changed = {p for p in paths if headers or str(p) in {edit.file for edit in edits}}
        objects = list(pool.map(lambda p: compile_object(p, asan, root if p in changed else ROOT), paths))
    # A process takes operators of one name once: all but the project's own get another name of the same length, written into the object files.
    key = digest(*map(str, objects))
    library = NAME if not edits and list(sources) == operator_sources() else f"interflow_{key[:8]}"
    target = cache_folder() / f"{library}-{key}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as folder:
            named = []
            for i, path in enumerate(objects):
                named.append(Path(folder) / f"{i}.o")
                named[-1].write_bytes(path.read_bytes().replace(NAME.encode(), library.encode()))
            torch_lib = Path(torch.__file__).parent / "lib"
            made = Path(folder) / "made.so"
            run([compiler(), "-shared", *(ASAN_FLAGS if asan else []), *named, f"-L{torch_lib}", "-ltorch_cpu", "-ldl", "-o", made])
            made.replace(target)
    return target, library


@functools.cache
def load_library(path: Path, library: str) -> SimpleNamespace:
    torch.ops.load_library(str(path))
    return SimpleNamespace(ops=getattr(torch.ops, library), control=ctypes.CDLL(str(path)), path=path)


def load(sources: Sequence[Path], edits: Sequence[Edit] = (), asan: bool = False) -> SimpleNamespace:
    """A built library: .ops are its operators on CPU tensors."""
    return load_library(*build(tuple(sources), tuple(edits), asan))


def asan_environment() -> dict[str, str] | None:
    """For a process that loads a library built with asan=True; None where the compiler has no AddressSanitizer."""
    found = run([compiler(), "-print-file-name=libasan.so"]).strip()
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    if not os.path.isabs(found):
        return None
    return {**os.environ, "LD_PRELOAD": found, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONPATH": path}


@contextlib.contextmanager
def emulated(library: SimpleNamespace, blocks: int = 7, seed: int = 0) -> Iterator[None]:
    """How many blocks run at once, and the order in which they do."""
    configure = library.control.interflow_emulation_set
    configure.argtypes = [ctypes.c_int64, ctypes.c_uint64]
    configure(blocks, seed)
    try:
        yield
    finally:
        configure(7, 0)


def assert_caught(library: SimpleNamespace, call: Callable[[Any], object], says: str, blocks: int = 7, seeds: Sequence[int] = range(3)) -> None:
    """That call(operators) faults in every one of these orders, and that each fault matches the pattern `says`."""
    for seed in seeds:
        with emulated(library, blocks, seed):
            try:
                call(library.ops)
            except RuntimeError as fault:
                said = str(fault)
            else:
                raise AssertionError(f"no fault with {blocks} blocks in the order of seed {seed}, expected: {says}")
        assert re.search(says, said), f"with {blocks} blocks in the order of seed {seed}: {said}\nexpected: {says}"


def copies_of_last_launch(library: SimpleNamespace) -> int:
    """How many asynchronous copies its threads made."""
    library.control.interflow_emulation_copies.restype = ctypes.c_int64
    return library.control.interflow_emulation_copies()


def shared_bytes_of_last_launch(library: SimpleNamespace) -> int:
    """What each of its blocks asked for."""
    library.control.interflow_emulation_shared_bytes.restype = ctypes.c_int64
    return library.control.interflow_emulation_shared_bytes()


def order_of_last_launch(library: SimpleNamespace) -> int:
    """A number that differs where threads ran in another order."""
    library.control.interflow_emulation_order.restype = ctypes.c_uint64
    return library.control.interflow_emulation_order()
