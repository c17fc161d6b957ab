"""`make gpu-kit`: one folder with the package, its compiled libraries for every GPU, and what is known of their build, to bring along to a GPU machine.

It runs under any Python >= 3.10 beside any torch >= 2.10: put it into PYTHONPATH, or name its libraries with INTERFLOW_LIBRARIES beside another tree.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .process import ROOT
from .setting import KIT

MOST = 64 << 20  # bytes
LIBRARIES = ("_cpu.abi3.so", "_cuda.abi3.so")
USE = """
import torch, interflow_kernels as ik
from interflow_kernels import _native
assert _native.cpu_error is None, _native.cpu_error
with ik.backend("native"):
    m, p = ik.stage_tap(torch.ones(1, 2, 4, 4))
    y = ik.FusedInterflowHead((2,), 3)([m])
print(ik.__file__)
"""


def beside_setup(name: str) -> Any:
    """A module of the project's root, which setup.py uses."""
    sys.path.insert(0, str(ROOT))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(ROOT))


OLDEST_GLIBC: tuple[int, ...] = beside_setup("old_glibc").OLDEST_GLIBC


def undefined(library: Path) -> set[str]:
    """The symbols that the library takes from others, with the version behind "@" where they have one."""
    said = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1] for line in said.splitlines() if " w " not in line}


def glibc_needed(symbols: Iterable[str]) -> tuple[int, int]:
    """The newest version of glibc that one of the symbols asks for."""
    found = [re.search(r"@GLIBC_(\d+)\.(\d+)", symbol) for symbol in symbols]
    return max(((int(m[1]), int(m[2])) for m in found if m), default=(0, 0))


def copied(package: str, source: Path, into: Path) -> None:
    """The package's Python files and data; nothing compiled."""
    for path in sorted(source.rglob("*")):
        if path.suffix in (".py", ".yaml", ".typed") and "__pycache__" not in path.parts:
            target = into / package / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def make(folder: Path = KIT) -> Path:
    """Builds and checks the kit; SystemExit with a sentence where it would not serve."""
    inside = folder / "interflow_kernels"
    for old in (*inside.rglob("*.py"), *inside.glob("_C.*")):
        old.unlink()
    words = ["setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder.parent / (folder.name + "-temp"))]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, env={**os.environ, "INTERFLOW_CUDA": os.environ.get("INTERFLOW_CUDA", "1")})
    for module in inside.glob("_C.*so"):
        module.unlink()  # for this Python alone
    copied("interflow_kernels", ROOT / "interflow_kernels", folder)
    copied("interflow_vision", ROOT / "python/interflow_vision", folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST:
        raise SystemExit(f"the kit takes {size >> 20} MiB, more than {MOST >> 20}: build for fewer GPUs (TORCH_CUDA_ARCH_LIST)")
    needed = max(glibc_needed(undefined(inside / name)) for name in LIBRARIES if (inside / name).exists())
    if needed > OLDEST_GLIBC:
        said = "the kit needs glibc {}.{}, newer than {}.{}: build it where objcopy (binutils) is, or on an older system"
        raise SystemExit(said.format(*needed, *OLDEST_GLIBC))
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "INTERFLOW_LIBRARIES")}
    ran = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=folder, env=environment)
    if ran.returncode != 0:
        raise SystemExit(f"the kit does not run here: {ran.stderr.strip().splitlines()[-1]}")
    built = json.loads((inside / "build_info.json").read_text())
    served = f"for {built['cuda_architectures'] or 'no GPU'}; stable ABI {built['stable_abi']}, {built['machine']}, glibc >= {needed[0]}.{needed[1]}"
    print(f"{folder}: {size / 2**20:.1f} MiB, {served}, commit {built['commit']}")
    return folder


def differs(folder: Path) -> str | None:
    """A sentence where the kit's libraries are not of this tree's sources, else None."""
    built = json.loads((folder / "interflow_kernels/build_info.json").read_text())
    return (
        None
        if built["sources"] == beside_setup("cuda_build").digest()
        else f"the kit was built from other sources (commit {built['commit']}); run `make gpu-kit` again"
    )


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else KIT)
