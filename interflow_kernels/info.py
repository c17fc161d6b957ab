"""`python -m interflow_kernels.info`: versions, what was built, which backend serves which device and why not another."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import _backend, _native
from ._native import build_info
from ._version import __version__
from .triton import tiles

__all__ = ["build_info", "devices", "report"]


def triton_version() -> str | None:
    """Of the installed Triton, which need not be imported for it, or None."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "pytorch-triton-xpu", "triton-xpu", "triton-windows"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def devices() -> list[tuple[str, int | None]]:
    """The device types that this torch can use here, each GPU with its number."""
    found: list[tuple[str, int | None]] = [("cpu", None)]
    if torch.cuda.is_available():
        found += [("cuda", index) for index in range(torch.cuda.device_count())]
    if torch.xpu.is_available():
        found += [("xpu", index) for index in range(torch.xpu.device_count())]
    if torch.backends.mps.is_available():
        found.append(("mps", None))
    return found


def gpu_lines() -> list[str]:
    """The CUDA kernels: with what they were built and for which GPUs, why they are not there, and the GPUs of this machine."""
    built = build_info() or {}
    lines = [f"CUDA kernels      built by CUDA {built['cuda']} for {built['cuda_architectures']}" if built.get("cuda") else "CUDA kernels      not built"]
    lines[0] += f" ({built['cuda_reason']})" if built.get("cuda_reason") else ""
    lines.append(f"  library         {_native.cuda_error or 'loaded'}")
    for device, index in devices():
        if device == "cuda":
            lines.append(
                "  cuda:{}          {}, compute capability {}.{}".format(index, torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index))
            )
    return lines


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
        lines.append(f"compiled part     {_native.python_error() or 'not built, or it does not load'}")
    else:
        lines.append(f"compiled part     {built['compiler']}, against torch {built['torch']}, stable ABI {built['stable_abi']}")
        if (other := _native.python_error()) is not None:
            lines.append(f"  python          {other}")
        if os.environ.get("INTERFLOW_LIBRARIES"):
            lines.append(f"  libraries       in {_native.libraries} (INTERFLOW_LIBRARIES)")
        widest = "avx2" if built["has_avx2"] and "avx2" in built["cpu_kernels"] else "baseline"
        running = "baseline" if os.environ.get("INTERFLOW_CPU_ISA") == "baseline" else widest
        lines.append(f"CPU kernels       {', '.join(built['cpu_kernels'])}; this processor runs {running}")
    lines += gpu_lines()
    lines.append(f"Triton            {triton_version() or 'not installed'} (kernels of its own, for GPUs without compiled ones; needs >= 3.6)")
    lines.append(f"  tiles           {tiles.described()}")
    lines.append(f"backend           {_backend.requested()!r} asked for (INTERFLOW_BACKEND, interflow_kernels.backend)")
    for device, index in devices():
        label = device if index is None else f"{device}:{index}"
        chosen = next((name for name in ("native", "triton") if _backend.reason_against(name, device, index) is None), "eager")
        lines.append(f"  {label:5} runs     {chosen}")
        for name in ("native", "triton"):
            reason = _backend.reason_against(name, device, index)
            if reason is not None:
                lines.append(f"  {label:5} not      {name}: {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
