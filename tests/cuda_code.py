"""What the compiler made of CUDA kernels: registers, spills and machine code, read without a GPU, and what is promised of them."""

import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from cuda_sass import Code, Instruction, instructions

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120")


@dataclass(frozen=True)
class Promise:
    """Of every kernel whose demangled name matches `kernel`: at most so many registers, and what its machine code holds.

    loads, stores: 16 bytes wide ones are among its accesses to global memory; copies: among its copies from there into shared memory.
    tensor_cores: matrix instructions are.
    """

    kernel: str
    registers: int
    loads: bool = False
    stores: bool = False
    copies: bool = False
    tensor_cores: bool = False


class Loads(Protocol):
    """Which loads of which kernels are looked at."""

    @property
    def kernel(self) -> str: ...
    @property
    def loads(self) -> str: ...


@dataclass
class Kernel:
    """One kernel for one architecture: what ptxas said, how often each opcode with its modifiers stands in the code, and how many batches of each size
    the loads make that match a pattern."""

    name: str
    architecture: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)
    batches: dict[str, Counter[int]] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        return sum(times for opcode, times in self.opcodes.items() if re.fullmatch(pattern, opcode))


WIDE_LOAD, WIDE_STORE = r"LDG(\.\w+)*\.(128|256)(\.\w+)*", r"STG(\.\w+)*\.(128|256)(\.\w+)*"
COPY_TO_SUM = r"LDGSTS(\.\w+)*\+UR"
WIDE_COPY = r"LDGSTS(\.\w+)*\.128(\.\w+)*"
LOCAL_MEMORY = r"(LDL|STL)(\.\w+)*"
FLOAT_ATOMIC = r"(RED|ATOM|ATOMG|ATOMS|REDG|REDS)(\.\w+)*\.(F16\w*|BF16\w*|F32\w*|F64\w*)(\.\w+)*"
MATRIX = r"[HIDQ]?G?MMA(\.\w+)*"


def complaints(kernel: Kernel, promises: Sequence[Promise]) -> list[str]:
    """What `kernel` does that no kernel may, or does not do that it promises; empty where all is well."""
    found = []
    if kernel.spills or kernel.stack:
        found.append(f"spills {kernel.spills} bytes, stack frame {kernel.stack}")
    if kernel.count(LOCAL_MEMORY):
        found.append(f"{kernel.count(LOCAL_MEMORY)} accesses to local memory")
    if kernel.count(COPY_TO_SUM):  # from sm_90 on ptxas names the wrong registers where the copy has a cache policy too
        found.append(f"{kernel.count(COPY_TO_SUM)} copies whose shared address is a sum with a uniform register")
    if kernel.count(FLOAT_ATOMIC):
        found.append(f"{kernel.count(FLOAT_ATOMIC)} atomics on floating numbers, whose order is not fixed")
    given = [p for p in promises if re.search(p.kernel, kernel.name)]
    if not given:
        found.append("no row of the table speaks of it")
    for promise in given[:1]:  # the first row that matches
        if kernel.registers > promise.registers:
            found.append(f"{kernel.registers} registers, at most {promise.registers} promised")
        if kernel.opcodes:
            for wanted, pattern, what in (
                (promise.loads, WIDE_LOAD, "16-byte loads"),
                (promise.stores, WIDE_STORE, "16-byte stores"),
                (promise.copies, WIDE_COPY, "16-byte copies into shared memory"),
                (promise.tensor_cores, MATRIX, "matrix instructions"),
            ):
                if wanted and not kernel.count(pattern):
                    found.append(f"no {what}")
    return [f"{kernel.name} for sm_{kernel.architecture}: {text}" for text in found]


# --- from nvcc and the disassembler -------------------------------------------------------------------------------------
def parse_log(log: str) -> list[Kernel]:
    """The kernels of a compiler run with -Xptxas=-v, by mangled name."""
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", line):
            kernels.append(Kernel(entry[1], entry[2]))
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernels:
                kernels[-1].stack = max(kernels[-1].stack, int(frame[1]))
                kernels[-1].spills = max(kernels[-1].spills, int(frame[2]) + int(frame[3]))
        elif used := re.search(r"Used (\d+) registers", line):
            kernels[-1].registers = int(used[1])
    return kernels


def disassembler() -> str | None:
    """cuobjdump of the toolkit, or of triton's package; None where neither is there."""
    import importlib.util

    triton = importlib.util.find_spec("triton")
    places = [Path(p) / "backends/nvidia/bin/cuobjdump" for p in (triton.submodule_search_locations or [] if triton else [])]
    found = shutil.which("cuobjdump") or next((str(p) for p in [Path("/usr/local/cuda/bin/cuobjdump"), *places] if p.exists()), None)
    return found


def functions(program: str, binary: Path) -> Iterator[tuple[str, str, list[Instruction]]]:
    """(architecture, mangled name, code) of every kernel in an object file or cubin."""
    architecture, name = "", ""
    code: list[Instruction] = []
    with subprocess.Popen([program, "-sass", str(binary)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for x in instructions(process.stdout):
            if isinstance(x, Instruction):
                code.append(x)
                continue
            function, target = re.match(r"\s+Function : (\S+)", x), re.match(r"\s*code for sm_(\w+)", x)
            if name and (function or target):
                yield architecture, name, code
                name, code = "", []
            if function:
                name = function[1]
            elif target:
                architecture = target[1]
    if name:
        yield architecture, name, code
    assert process.returncode == 0, f"{program} -sass {binary} failed"


def counted(x: Instruction) -> str:
    """Its opcode with modifiers, and "+UR" behind a copy into shared memory whose address there is a sum with a uniform register."""
    to_sum = x.name == "LDGSTS" and re.match(r"\[\w+\+UR", x.operands)
    return x.opcode + ("+UR" if to_sum else "")


def demangled(names: Sequence[str]) -> dict[str, str]:
    """mangled -> demangled, unchanged where c++filt is missing."""
    program = shutil.which("c++filt")
    if program is None or not names:
        return {name: name for name in names}
    done = subprocess.run([program], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def kernels_of(log: str, binary: Path, program: str | None, looked_at: Sequence[Loads] = ()) -> list[Kernel]:
    """Every kernel of one compiled file for every architecture; without a disassembler what is read from machine code stays empty."""
    found = {(k.architecture, k.name): k for k in parse_log(log)}
    names = demangled(list(dict.fromkeys(k.name for k in found.values())))
    if program is not None:
        for architecture, name, code in functions(program, binary):
            kernel = found[architecture, name]
            kernel.opcodes = Counter(map(counted, code))
            patterns = {row.loads for row in looked_at if re.search(row.kernel, names[name])}
            if patterns:
                flow = Code(code)
                kernel.batches = {pattern: flow.batches(pattern) for pattern in patterns}
    for kernel in found.values():
        kernel.name = names[kernel.name]
    return list(found.values())


# --- the source ---------------------------------------------------------------------------------------------------------
FORBIDDEN = {
    r"<<<": "launches go through launch() of launch.h",
    r"__shared__": "shared memory comes from shared_memory()",
    r"\basm\b": "inline PTX stands in ptx.cuh",
}
MAY_HOLD_PTX = ("ptx.cuh", "packed.cuh")


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)


def forbidden(name: str, text: str) -> list[str]:
    """What a kernel file holds that only other files may, and kernels without launch bounds."""
    text = without_comments(text)
    found = [] if name in MAY_HOLD_PTX else [f"{name} holds {pattern}: {why}" for pattern, why in FORBIDDEN.items() if re.search(pattern, text)]
    for kernel in re.finditer(r"__global__(.*?)[({]", text, re.DOTALL):
        if "__launch_bounds__" not in text[kernel.start() : kernel.end()]:
            found.append(f"{name}: __global__{kernel[1]} has no __launch_bounds__")
    return found
