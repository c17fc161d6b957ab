"""What is known about building the CUDA library: where nvcc is, whether and for which GPUs it builds, and how the kernels are compiled.

setup.py and the tests import this module. The environment variables are described in setup.py.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent

ARCHITECTURES = "8.0 8.6 8.9 9.0a 10.0 12.0+PTX"
"""A100; RTX 30, A10; RTX 40, L4, L40; H100, H200; B200; RTX 50; PTX for what comes after."""
OLDEST = 80
# -fmad=false: a multiplication and an addition become one rounding only where the source says fmaf, so that bits do not depend on how the compiler
# unrolled the copy of a loop that a batch size chose.
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all", "-Xptxas=-v"]


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def digest() -> str:
    """Of the compiled sources: whether libraries that were brought along are those of this tree."""
    found = hashlib.sha256()
    for name in sources("csrc/**/*.cpp", "csrc/**/*.h", "csrc/**/*.cu", "csrc/**/*.cuh"):
        found.update(name.encode() + b"\0" + Path(ROOT, name).read_bytes())
    return found.hexdigest()[:16]


def switch(name: str) -> str:
    """The environment variable `name`: "0", "1" or, where it is not set, ""."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return value


def jobs() -> int:
    """How many compilers may run at once: MAX_JOBS, else one for each core."""
    value = os.environ.get("MAX_JOBS", "")
    if value and not (value.isdecimal() and int(value) > 0):
        raise SystemExit(f"MAX_JOBS must be a number of processes, at least 1, got {value!r}")
    return int(value) if value else len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: its compiler, its version (13, 0), and where headers and libraries lie."""

    nvcc: str
    version: tuple[int, int]
    includes: list[str]
    libraries: list[str]
    codes: frozenset[int]  # what its compiler can build for: 80, 86, ...


def find_toolkit() -> Toolkit | None:
    """The first of CUDA_HOME, PATH and /usr/local/cuda that has an nvcc which runs."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    for candidate in (f"{home}/bin/nvcc" if home else None, shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if candidate is None or not os.access(candidate, os.X_OK):
            continue
        try:
            said = output_of(candidate, "--version")
            dry = subprocess.run([candidate, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr  # PATH may hold a wrapper: ask
        except (OSError, subprocess.CalledProcessError):
            continue
        release, top = re.search(r"release (\d+)\.(\d+)", said), re.search(r"^#\$ TOP=(.+)$", dry, re.MULTILINE)
        if release is None or top is None:
            continue
        root = Path(top[1].strip()).resolve()
        targets = [root, *sorted(root.glob("targets/*-linux"))]
        return Toolkit(
            candidate,
            (int(release[1]), int(release[2])),
            [str(t / "include") for t in targets if (t / "include/cuda_runtime_api.h").exists()],
            [str(found.parent) for t in targets for found in t.glob("lib*/libcudart_static.a")],
            frozenset(int(code) for code in re.findall(r"sm_(\d+)", output_of(candidate, "--list-gpu-code"))),
        )
    return None


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Cuda:
    """Whether the CUDA library is built, why, with what and for which GPUs ("80", "90a", ...; PTX of `ptx`)."""

    toolkit: Toolkit | None
    reason: str
    architectures: tuple[str, ...] = ()
    ptx: str | None = None

    def listed(self) -> str:
        """As build_info() tells it: "80 86 89 90a 100 120+PTX"."""
        return " ".join(code + ("+PTX" if code == self.ptx else "") for code in self.architectures)

    def gencodes(self) -> list[str]:
        """nvcc's flags."""
        return [f"-gencode=arch=compute_{c},code=" + (f"[sm_{c},compute_{c}]" if c == self.ptx else f"sm_{c}") for c in self.architectures]


def decide_cuda(torch_cuda: str | None) -> Cuda:
    """`torch_cuda`: the CUDA version of the torch that is built against, "13.0", or None."""
    asked = switch("INTERFLOW_CUDA")
    if asked == "0":
        return Cuda(None, "INTERFLOW_CUDA=0 at build time")
    if not asked and torch_cuda is None:
        return Cuda(None, "built against a torch without CUDA")
    toolkit = find_toolkit()
    if toolkit is None:
        if asked:
            raise SystemExit("INTERFLOW_CUDA=1 but no nvcc in CUDA_HOME, PATH or /usr/local/cuda; install the CUDA toolkit or set CUDA_HOME to it")
        return Cuda(None, "no nvcc in CUDA_HOME, PATH or /usr/local/cuda at build time")
    if not toolkit.includes or not toolkit.libraries:
        problem = f"{toolkit.nvcc} comes without cuda_runtime_api.h or libcudart_static.a; install the toolkit's cudart development files"
        if asked:
            raise SystemExit(f"INTERFLOW_CUDA=1 but {problem}")
        return Cuda(None, problem)
    major = toolkit.version[0]
    if torch_cuda is not None and int(torch_cuda.split(".")[0]) != major:
        problem = f"nvcc is of CUDA {major}, torch of CUDA {torch_cuda}; set CUDA_HOME to a toolkit of torch's major version"
        if asked:
            raise SystemExit(f"INTERFLOW_CUDA=1 but {problem}")
        return Cuda(None, problem)
    reason = "INTERFLOW_CUDA=1" if asked else f"{toolkit.nvcc} is there and torch is built for CUDA {torch_cuda}"
    return Cuda(toolkit, reason, *architectures(toolkit, os.environ.get("TORCH_CUDA_ARCH_LIST", "")))


def architectures(toolkit: Toolkit, asked: str) -> tuple[tuple[str, ...], str | None]:
    """The codes of TORCH_CUDA_ARCH_LIST ("8.0;8.6 9.0a+PTX"), or the default ones that this nvcc knows, and that whose PTX goes along."""
    codes, ptx = [], None
    for word in re.split(r"[ ;,]+", (asked or ARCHITECTURES).strip()):
        parsed = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", word)
        if parsed is None:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be capabilities such as '8.0 9.0a 12.0+PTX', got {word!r} in {asked!r}")
        number, code = int(parsed[1] + parsed[2]), parsed[1] + parsed[2] + parsed[3]
        if number < OLDEST:
            print(f"interflow-kernels: {word} of TORCH_CUDA_ARCH_LIST is left out: the kernels need compute capability 8.0")
            continue
        if number not in toolkit.codes:
            if asked:
                known = ", ".join(f"{c // 10}.{c % 10}" for c in sorted(toolkit.codes) if c >= OLDEST)
                raise SystemExit(
                    f"TORCH_CUDA_ARCH_LIST names {word}, which the nvcc of CUDA {toolkit.version[0]}.{toolkit.version[1]} does not know; it knows {known}"
                )
            continue
        codes.append(code)
        ptx = code if parsed[4] else ptx
    if not codes:
        raise SystemExit(f"TORCH_CUDA_ARCH_LIST names no GPU that the kernels run on, compute capability 8.0 or newer, got {asked!r}")
    if not asked:
        ptx = codes[-1]
    return tuple(dict.fromkeys(codes)), ptx


QUIET = re.compile(r"ptxas info|\s+\d+ bytes (stack frame|cumulative)|$")  # what -Xptxas=-v adds to a build's messages


def nvcc_command(cuda: Cuda, source: str, into: str) -> list[str]:
    """Compiles one .cu file for all architectures."""
    assert cuda.toolkit is not None
    return [cuda.toolkit.nvcc, "-c", source, "-o", into, f"-I{ROOT / 'csrc'}", *NVCC_FLAGS, *cuda.gencodes()]


def object_name(kernel: str) -> str:
    """Of the operator and the file: interflow_head_forward for csrc/interflow_head/cuda/forward.cu."""
    return f"{Path(kernel).parts[-3]}_{Path(kernel).stem}"


def compile_kernels(cuda: Cuda, kernels: list[str], folder: Path) -> list[str]:
    """The .cu files as objects in `folder`, the largest first, jobs() compilers at a time; what is up to date stays. Registers used are in FILE.log."""
    folder.mkdir(parents=True, exist_ok=True)
    headers = max(Path(ROOT, h).stat().st_mtime for h in sources("csrc/**/*.h", "csrc/**/*.cuh"))
    kernels = sorted(kernels, key=lambda k: -Path(ROOT, k).stat().st_size)
    threads = max(1, jobs() // max(1, len(kernels)))

    def one(kernel: str) -> str:
        into, note, log = (folder / (object_name(kernel) + suffix) for suffix in (".o", ".command", ".log"))
        command = [*nvcc_command(cuda, str(ROOT / kernel), str(into)), f"--threads={threads}"]
        text = shlex.join(command)
        if into.exists() and note.exists() and note.read_text() == text and into.stat().st_mtime > max(headers, Path(ROOT, kernel).stat().st_mtime):
            return str(into)
        note.unlink(missing_ok=True)
        print(text, flush=True)
        done = subprocess.run(command, capture_output=True, text=True)
        log.write_text(done.stderr)
        sys.stderr.writelines(line + "\n" for line in (done.stdout + done.stderr).splitlines() if not QUIET.match(line))
        if done.returncode:
            raise SystemExit(f"interflow-kernels: nvcc failed on {kernel}, see its messages above; INTERFLOW_CUDA=0 builds without the CUDA kernels")
        note.write_text(text)
        return str(into)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(one, kernels))
