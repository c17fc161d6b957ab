"""How the head's products run, by kind of GPU. Which way it is is part of the bits."""

import functools

import torch

PARTS, FP32_UNITS, MULTIPLY_ADDS = "parts", "fp32 units", "multiply-adds"


def products(maker: str, capability: int, width: int) -> str:
    """In parts on bf16 matrix units, or fp32 as it is, on matrix units for fp32 or by multiply-adds; width: threads of the GPU's warp.

    CDNA ("hip", warps of 64) has units for fp32; on RDNA the splitting alone costs more than multiply-adds. NVIDIA has bf16 units from capability 80 on.
    """
    if maker == "hip":
        return FP32_UNITS if width == 64 else MULTIPLY_ADDS
    return PARTS if capability >= 80 else MULTIPLY_ADDS


@functools.cache
def products_on(device: torch.device) -> str:
    """`products` of a device; other makers' GPUs, and the interpreter, take parts."""
    if device.type != "cuda":
        return PARTS
    major, minor = torch.cuda.get_device_capability(device)
    return products("hip" if torch.version.hip else "cuda", 10 * major + minor, torch.cuda.get_device_properties(device).warp_size)
