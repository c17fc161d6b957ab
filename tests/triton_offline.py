"""Compiles the Triton kernels that a call would launch, for any target, without a GPU; reads registers, spills and instructions."""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from interflow_kernels.triton import tiles
from interflow_kernels.triton.common.launch import noted, options
from interflow_kernels.triton.common.products import products
from interflow_kernels.triton.interflow_head import backward, forward

TARGETS = {
    **{f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, size) for arch, size in (("gfx90a", 64), ("gfx942", 64), ("gfx1100", 32))},
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int32: "*i32"}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@contextmanager
def recorded(target="sm_90"):
    """Inside it, the host functions launch nothing; each launch is noted instead, as on the target."""
    gpu = TARGETS[target]
    way = products(gpu.backend, gpu.arch if gpu.backend == "cuda" else 0, gpu.warp_size)
    with pytest.MonkeyPatch.context() as patch, tiles.replaced(tiles.table()), noted(launching=False) as launches:
        for module in (forward, backward):
            patch.setattr(module, "products_on", lambda device: way)
        yield launches


def _source(launch, target, unaligned):
    parameters = launch.kernel.params
    values = [*launch.arguments, *launch.constants]
    assert len(parameters) == len(values), (launch.kernel, len(parameters), len(values))
    signature, constants, attributes = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]] * (parameter.name not in unaligned) + [["tt.pointer_range", 32]] * (target.backend == "hip")
        else:
            signature[parameter.name] = "i32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled(launch, target, unaligned=()):
    """What Triton would compile for this launch, its tensors 16-byte aligned as an allocator gives them, and on AMD in memory within 2 GiB.

    unaligned: names of arguments whose tensors begin elsewhere, as views may.
    """
    chosen = options(target.backend, target.warp_size, launch.warps, launch.stages)
    return triton.compile(_source(launch, target, unaligned), target=target, options=chosen)


def translated(launch, target):
    """Triton's first intermediate representation of the kernel, as text: all that can fail in the kernel's own source, in a tenth of the time."""
    backend, source, context = make_backend(target), _source(launch, target, ()), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    chosen = backend.parse_options(options(target.backend, target.warp_size, launch.warps, launch.stages))
    return str(source.make_ir(target, chosen, backend.get_codegen_implementation(chosen), backend.get_module_map(), context))


def runtime_arguments(launch):
    return sum(value is not None for value in launch.arguments)


def tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def resources(kernel):
    """registers of a thread, bytes spilled, 16-byte accesses to global memory (loads, stores), matrix instructions."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # noqa: E731
        wide = lambda what: len(re.findall(rf"(?:buffer|global)_{what}_(?:dwordx4|b128)", text))  # noqa: E731
        matrix = len(re.findall(r"v_w?mfma_|v_mfma|v_wmma", text))
        return SimpleNamespace(registers=number("vgpr_count"), spilled=number("vgpr_spill_count"), loads=wide("load"), stores=wide("store"), matrix=matrix)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(kernel.asm["cubin"])
        usage, code = tool("cuobjdump", "-res-usage", path), tool("nvdisasm", "-c", path)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    spilled = stack + 4 * len(re.findall(r"\b(?:LDL|STL)\b", code))
    wide = lambda what: len(re.findall(rf"\b{what}\.E\S*\.128", code))  # noqa: E731
    matrix = len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|QMMA)", code))
    return SimpleNamespace(registers=registers, spilled=spilled, loads=wide("LDG"), stores=wide("STG"), matrix=matrix)


def vgg16_maps(batch, dtype, layout):
    """The maps of VGG-16's four stages at 224 pixels."""
    maps = []
    for channels, side in ((128, 112), (256, 56), (512, 28), (512, 14)):
        x = torch.empty(batch, channels, side, side, dtype=dtype)
        maps.append(x.to(memory_format=torch.channels_last) if layout == "channels_last" else x)
    return maps
