"""Order in the machine code of every CUDA kernel on every architecture: loads of a batch are all issued before the first is waited for."""

import re
import shutil
import subprocess

import pytest
from cuda_batches import BATCHES, STREAM, STREAM_BYTE, Batch, broken
from cuda_code import ARCHITECTURES, Kernel, disassembler, functions, kernels_of
from cuda_library import ROOT, TOOLKIT, cuda_build, needs_nvcc
from cuda_sass import Code, Instruction, instructions

pytest_plugins = ["cuda_library"]  # its fixtures

needs_disassembler = pytest.mark.skipif(disassembler() is None, reason="no cuobjdump, neither of the toolkit nor of triton")


# --- the kernels ----------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@needs_disassembler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_of_a_batch_are_on_their_way_together(kernels, architecture):
    mine = [k for k in kernels if k.architecture == architecture]
    found = [text for kernel in mine for text in broken(kernel)]
    assert mine and not found, "\n".join(found)


@pytest.mark.slow
def test_every_row_speaks_of_a_kernel(kernels):
    for row in BATCHES:
        assert any(re.search(row.kernel, k.name) for k in kernels), row


@pytest.mark.slow
@needs_disassembler
def test_the_watchdog_costs_nothing_but_where_a_tile_waits(built):
    """The clock is read in the three loops that poll, right behind their sleep, and nowhere else in any kernel."""
    places = 0
    for file in sorted(built.folder.glob("*.o")):
        for _, name, code in functions(disassembler(), file):
            clocks = [i for i, x in enumerate(code) if "GLOBALTIMER" in x.operands]
            assert len(clocks) <= ("interflow_head_forward_kernel" in name) * 2 * 3, name
            for i in clocks:
                assert "NANOSLEEP" in {x.name for x in code[i - 12 : i]}, f"{name}: {hex(code[i].address)}"
            places += bool(clocks)
    assert places == 3 * len(ARCHITECTURES)


# --- that a batch that falls apart is seen ----------------------------------------------------------------------------------
# What a kernel of two loads is made of: instruction, scoreboard that it signals, scoreboards that it waits for.
FIRST, SECOND = ("LDG.E.64 R4, desc[UR4][R2.64]", 2, ()), ("LDG.E.64 R6, desc[UR4][R8.64]", 2, ())
USE = ("FADD R10, R5, R5", None, (2,))
OTHER = ("LDG.E R12, desc[UR4][R2.64]", 3, ())
SKIP = ("@!P0 BRA 0x30", None, ())
CODES = {
    "together": ([FIRST, SECOND, USE], {2: 1}),
    "used at once": ([FIRST, USE, SECOND], {1: 2}),
    "waited for at once": ([FIRST, ("NOP", None, (2,)), SECOND], {1: 2}),
    "waited for by the second load": ([FIRST, (SECOND[0], 2, (2,))], {1: 2}),
    "overwritten": ([FIRST, ("MOV R5, RZ", None, ()), SECOND], {1: 2}),
    "the second behind a branch": ([FIRST, SKIP, SECOND, USE], {2: 1}),
    "used on the way to it": ([FIRST, SKIP, USE, SECOND], {2: 1}),  # the branch goes round the use
    "used on every way to it": ([FIRST, ("@!P0 BRA 0x20", None, ()), USE, SECOND], {1: 2}),
    "another load between": ([FIRST, OTHER, SECOND, USE], {2: 1}),
    "another load waited for": ([FIRST, OTHER, ("FADD R13, R12, R12", None, (3,)), SECOND, USE], {2: 1}),
    "the second never reached": ([FIRST, ("EXIT", None, ()), SECOND], {1: 2}),
}


def listing(code) -> list[str]:
    """As cuobjdump prints it: two lines each, whose second says what is signalled and waited for."""
    lines = []
    for i, (text, signals, waits) in enumerate(code):
        control = (7 if signals is None else signals) << 5 | sum(1 << 11 + w for w in waits) | 7 << 8
        lines += [f"        /*{16 * i:04x}*/   {text} ;   /* 0x{0:016x} */\n", f"                        /* 0x{control << 41:016x} */\n"]
    return lines


@pytest.mark.parametrize("name", CODES)
def test_what_a_batch_is(name):
    code, expected = CODES[name]
    read = list(instructions(["\t\tFunction : k\n", *listing(code)]))
    assert read[0] == "\t\tFunction : k\n" and all(isinstance(x, Instruction) for x in read[1:])
    assert Code(read[1:]).batches(r"LDG\.E\.64") == expected


def test_a_broken_batch_is_named():
    kernel = Kernel("pool", "90a", batches={STREAM: Code(list(instructions(listing(CODES["used at once"][0])))).batches(r"LDG.*")})
    assert broken(kernel, [Batch("pool", STREAM, 1, 2, "steps")]) == []
    (text,) = broken(kernel, [Batch("pool", STREAM, 2, 1, "steps")])
    assert text == "pool for sm_90a: steps: 0 batches of 2 loads, 1 expected; found {1: 2} (loads: places)"


@pytest.mark.slow
@needs_nvcc
@needs_disassembler
def test_a_load_behind_a_branch_is_seen(tmp_path):
    """A mutant of the tap's backward: a test that a loop has made already lets the compiler hold back the last of four loads."""
    folder = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", folder)
    file = folder / "stage_tap/cuda/backward_planes.cuh"
    text = file.read_text()
    assert text.count("if (t > 0 && piece >= last) break;") == 1
    file.write_text(text.replace("if (t > 0 && piece >= last) break;", "if (piece >= last) break;"))
    cubin = tmp_path / "mutant.cubin"
    flags = [f for f in cuda_build.NVCC_FLAGS if not f.startswith(("-Xcompiler", "-Xfatbin"))]
    done = subprocess.run(
        [TOOLKIT.nvcc, "-cubin", "-arch=sm_90a", f"-I{folder}", *flags, folder / "stage_tap/cuda/backward.cu", "-o", cubin], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [text for kernel in kernels_of(done.stderr, cubin, disassembler(), BATCHES) for text in broken(kernel)]
    assert found and all("tap_planes_backward" in text and "the mask of four pieces: 0 batches of 4 loads" in text for text in found), found
    assert STREAM_BYTE in {row.loads for row in BATCHES}
