"""No CPU operator reads or writes outside its tensors: inputs, outputs and scratch memory lie at inaccessible pages, in a process of its own."""

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """guarded(extent, isa): runs guard_pages.py; its exit status and the lines of its output."""
    compiler = shlex.split(os.environ.get("CC") or "cc")
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or shutil.which(compiler[0]) is None:
        pytest.skip("needs glibc and a C compiler (CC, cc)")
    library = tmp_path_factory.mktemp("guard") / "guard_allocator.so"
    subprocess.run([*compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", str(HERE / "guard_allocator.c"), "-o", str(library)], check=True)

    def run(extent: str, isa: str = "") -> tuple[int, list[str]]:
        environment = {**os.environ, "LD_PRELOAD": str(library), "INTERFLOW_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
        done = subprocess.run([sys.executable, str(HERE / "guard_pages.py"), extent], env=environment, capture_output=True, text=True)
        return done.returncode, [*done.stdout.splitlines(), *(done.stderr.splitlines()[-5:] if done.returncode > 0 else [])]

    return run


def check(guarded, extent, isa, least):
    status, lines = guarded(extent, isa)
    cause = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    assert status == 0, f"{cause} in: " + "\n".join(lines[-6:] if status > 0 else lines[-1:])
    done = re.fullmatch(r"done: (\d+) calls, (\d+) guarded blocks of memory", lines[-1])
    assert done is not None and int(done[1]) >= least and int(done[2]) > int(done[1]), lines[-1]


@pytest.mark.parametrize("isa", ["", "baseline"], ids=["vectors", "baseline"])
def test_odd_sizes(guarded, isa):
    check(guarded, "quick", isa, 900)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["", "baseline"], ids=["vectors", "baseline"])
def test_every_pair_of_channels_and_widths_up_to_17(guarded, isa):
    check(guarded, "full", isa, 60_000)


def test_what_leaves_its_memory_is_seen(guarded):
    status, lines = guarded("faults")
    assert status == 0 and len(lines) == 6, lines
    assert {int(line.rpartition(": ")[2]) for line in lines} <= {signal.SIGSEGV, signal.SIGBUS}, lines
