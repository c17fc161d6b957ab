"""`python -m interflow_kernels.info`: versions, what was built, which backend serves which device and why not another."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _backend, _native
from ._version import __version__


def build_info() -> dict[str, Any] | None:
    """What the compiled module says of itself, or None where it was not built or does not load."""
    try:
        from . import _C  # type: ignore[attr-defined]
    except ImportError:
        return None
    return dict(_C.build_info(), has_avx2=_C.has_avx2())


def triton_version() -> str | None:
    """Of the installed Triton, which need not be imported for it, or None."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu", "triton-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def devices() -> list[str]:
    """The device types that this torch can use here."""
    found = ["cpu"]
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.xpu.is_available():
        found.append("xpu")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def report() -> str:
    """The whole report as text, the first thing to attach to a bug report."""
    lines = [
        f"interflow_kernels {__version__}",
        f"torch             {torch.__version__} (needs >= {'.'.join(map(str, _native.MINIMUM_TORCH))}), {torch.get_num_threads()} threads",
        f"python            {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch CUDA        {torch.version.cuda or 'not in this build of torch'}",
    ]
    built = build_info()
    if built is None:
        lines.append("compiled part     not built, or it does not load")
    else:
        lines.append(f"compiled part     {built['compiler']}, against torch {built['torch']}, stable ABI {built['stable_abi']}")
        widest = "avx2" if built["has_avx2"] and "avx2" in built["cpu_kernels"] else "baseline"
        running = "baseline" if os.environ.get("INTERFLOW_CPU_ISA") == "baseline" else widest
        lines.append(f"CPU kernels       {', '.join(built['cpu_kernels'])}; this processor runs {running}")
    lines.append("GPU kernels       none in this version (CUDA architectures: none)")
    lines.append(f"Triton            {triton_version() or 'not installed'} (kernels of its own, for GPUs without compiled ones; needs >= 3.6)")
    lines.append(f"backend           {_backend.requested()!r} asked for (INTERFLOW_BACKEND, interflow_kernels.backend)")
    for device in devices():
        chosen = next((name for name in ("native", "triton") if _backend.reason_against(name, device) is None), "eager")
        lines.append(f"  {device:5} runs     {chosen}")
        for name in ("native", "triton"):
            reason = _backend.reason_against(name, device)
            if reason is not None:
                lines.append(f"  {device:5} not      {name}: {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
