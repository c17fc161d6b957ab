"""What the measurements ran on: names, clocks, caches, versions, and no name of anybody's computer."""

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from interflow_kernels import _backend
from interflow_kernels.info import build_info

PACKAGES = ("torch", "triton", "interflow-kernels", "numpy", "onnxruntime", "openvino", "tensorrt", "pytest-benchmark")


def cpu_name() -> str:
    """As the processor calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_mhz() -> float | None:
    """Of the first core, now; None where the system does not say."""
    mhz = _cpuinfo("cpu MHz")
    return round(float(mhz)) if mhz else None


def cache_bytes() -> int:
    """The size of the last cache level that one core sees; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max([int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units], default=32 << 20)


def cold_bytes(device: torch.device) -> int:
    """What rotating inputs must exceed together so that none is in a cache when its turn comes again: three times the last level."""
    if device.type == "cuda":
        return 3 * torch.cuda.get_device_properties(device).L2_cache_size
    return 3 * cache_bytes()


def others_seconds() -> float | None:
    """CPU seconds that the whole machine has spent so far, this process's left out, stolen time included; None where it does not say."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = (int(word) for word in file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    own = os.times()
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def wait_for_quiet(at_most: float, probe: float = 0.25) -> float:
    """Waits until other processes leave the cores alone for `probe` seconds, `at_most` so long; returns the seconds waited.

    Two cores of which one is shared are worse than half: threads that wait for each other wait for the scheduler's slices.
    """
    start = time.perf_counter()
    while (waited := time.perf_counter() - start) < at_most:
        before = others_seconds()
        if before is None:
            break
        time.sleep(probe)
        if (others_seconds() or 0.0) - before < 0.1 * probe:
            break
    return waited


def versions() -> dict[str, str]:
    """Of what takes part, where it is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with its build: +cpu, +cu130


def describe(device: torch.device) -> dict[str, Any]:
    """Names, clocks and versions for the report's first lines."""
    about: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_mhz": cpu_mhz(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_mib": cache_bytes() >> 20,
        "transparent_hugepage": _thp(),
        "versions": versions(),
    }
    if device.type == "cuda":
        about |= gpu(device)
    return about


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, size, clocks, CUDA versions, and for which GPUs the kernels were built."""
    properties = torch.cuda.get_device_properties(device)
    built = build_info() or {}
    return {
        "gpu": properties.name,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": properties.total_memory >> 30,
        "gpu_l2_mib": properties.L2_cache_size >> 20,
        "cuda": {
            "torch": torch.version.cuda,
            "kernels": built.get("cuda"),
            "architectures": built.get("cuda_architectures"),
            "cudnn": torch.backends.cudnn.version(),
        },
        "backend": _backend.select("cuda", device.index),
        **gpu_clocks(),
    }


def gpu_clocks() -> dict[str, str]:
    """SM and memory clock in MHz and the driver, from nvidia-smi, as they are before the measurements; empty where it is not there."""
    query = "clocks.sm,clocks.mem,driver_version"
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(("gpu_sm_mhz", "gpu_memory_mhz", "gpu_driver"), done.stdout.splitlines()[0].split(", "), strict=True))


def _cpuinfo(key: str) -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith(key)), None)
    except OSError:
        return None


def _thp() -> str | None:
    """How the kernel gives huge pages, which large fresh outputs feel: always, madvise or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    return text[text.index("[") + 1 : text.index("]")]
