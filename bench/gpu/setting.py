"""Where the parts run: the device, the kit, the folder for results, and the environment that their commands get."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .process import ROOT, Log

KIT = ROOT / "build/gpu-kit"
ASK = "import torch; print(torch.cuda.get_device_name(), *torch.cuda.get_device_capability(), sep='\\n')"


class Unusable(Exception):
    """No part can run; the message is one sentence with the next step."""


@dataclass(frozen=True)
class Setting:
    """device: "cuda", or "cpu" for a rehearsal. kit: a folder with the compiled libraries, or None where they were built in place."""

    device: str
    out: Path
    kit: Path | None
    say: Log
    capability: tuple[int, int] | None = None
    full: bool = False
    only: str = ""  # what smoke checks and cases must have in their names

    @property
    def rehearsal(self) -> bool:
        return self.device != "cuda"

    def environment(self, **more: str) -> Mapping[str, str]:
        """For a command of a part: this tree's modules, the kit's libraries, and the compiled kernels or an error: a fallback is never taken for them."""
        paths = [str(ROOT / "bench"), str(ROOT), str(ROOT / "python"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        chosen = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)), "INTERFLOW_BACKEND": "native", **more}
        return chosen | ({"INTERFLOW_LIBRARIES": str(self.kit / "interflow_kernels")} if self.kit is not None else {})


def folder_name(gpu: str) -> str:
    """ "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def architecture(capability: tuple[int, int]) -> str:
    """What TORCH_CUDA_ARCH_LIST says for this GPU alone, as the default build names it: 9.0a for (9, 0)."""
    major, minor = capability
    return f"{major}.{minor}" + ("a" if capability == (9, 0) else "")


def gpu() -> tuple[str, tuple[int, int]]:
    """Name and compute capability; asked by another process, whose context does not stay on the GPU that is measured. Raises Unusable."""
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    if asked.returncode != 0:
        raise Unusable(f"make gpu needs torch and an NVIDIA GPU that it can use (DEVICE=cpu rehearses without): {asked.stderr.strip().splitlines()[-1]}")
    name, major, minor = asked.stdout.strip().splitlines()[-3:]
    return name, (int(major), int(minor))


def kit_at(given: str) -> Path | None:
    """The folder that was asked for, the usual one where it is there, or None for "none". Raises Unusable where what was asked for is no kit."""
    if given == "none":
        return None
    folder = Path(given).resolve() if given else KIT
    if (folder / "interflow_kernels/build_info.json").exists():
        return folder
    if given:
        raise Unusable(f"--kit must be a folder that `make gpu-kit` made, got {given}, which has no interflow_kernels/build_info.json; run `make gpu-kit`")
    return None
