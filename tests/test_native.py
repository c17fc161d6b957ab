"""The CPU kernels outside Python: under AddressSanitizer, and the same bytes from every instruction set."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["stage_tap", "stage_end"])
def test_instruction_sets_agree_and_stay_inside_their_tensors(stem, tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("no C++ compiler (CXX, g++)")
    sources = [ROOT / f"tests/native/{stem}_driver.cpp", *(ROOT / f"csrc/{stem}/cpu/{isa}.cpp" for isa in ("baseline", "avx2"))]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wno-psabi", "-fsanitize=address"]
    include = Path(torch.__file__).parent / "include"
    build = [compiler, *flags, f"-I{ROOT / 'csrc'}", f"-isystem{include}", *map(str, sources), "-o", str(tmp_path / "driver")]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, env={**os.environ, "LD_PRELOAD": ""})
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
    assert ran.stdout == "2880 cases\n"


OLDER = """
import warnings, torch
found = torch._C._jit_get_schemas_for_operator
torch._C._jit_get_schemas_for_operator = lambda name: [] if name == "interflow_kernels::interflow_pool" else found(name)
import interflow_kernels as k
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    k.FusedInterflowHead((4,), 5, norm="batch")([torch.randn(2, 4, 3, 3)]).sum().backward()
print(*[w.message for w in caught])
"""


def test_a_library_of_older_sources_is_not_used():
    done = subprocess.run([sys.executable, "-c", OLDER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "was built of older sources, without interflow_kernels::interflow_pool; reinstall with: pip install" in done.stdout
