"""Registers, spills and kinds of instructions of every CUDA kernel on every architecture, read without a GPU: what the table promises is kept."""

import re
import subprocess

import pytest
from cuda_code import ARCHITECTURES, Kernel, Promise, complaints, counted, disassembler, forbidden, kernels_of, parse_log
from cuda_library import KERNEL_FILES, ROOT, TOOLKIT, needs_nvcc
from cuda_sass import Instruction

pytest_plugins = ["cuda_library"]  # its fixtures

PATH = r"\(interflow::TapPath\)"
PROMISES = (
    # pooled, weights, y: the tail multiplies on tensor cores; two blocks of 256 threads a multiprocessor
    Promise("interflow_head_forward_kernel<float>", 128, loads=True),
    Promise("interflow_head_forward_kernel", 128, loads=True, tensor_cores=True),
    Promise("interflow_pool_kernel", 128, loads=True),
    Promise("interflow_head_scores_kernel", 128, loads=True, tensor_cores=True),
    Promise("interflow_head_products_kernel", 128, loads=True),
    Promise("interflow_head_epilogue_kernel", 64),
    # NHWC and NCHW <T, residual, wide>, backward <T, relu, wide>: three blocks a multiprocessor forward where accesses are 16 bytes wide (NCHW: and
    # there is no residual), else two
    Promise(r"end_planes<\w+, true, true>", 128, loads=True, stores=True),
    Promise(r"end_(pixels|planes)<\w+, \w+, true>", 80, loads=True, stores=True),
    Promise(r"end_(pixels|planes)_backward<\w+, \w+, true>", 128, loads=True, stores=True),
    Promise(r"end_(pixels|planes)(_backward)?<\w+, \w+, false>", 128),
    # NHWC <T, max_pool, wide, mask>, backward <T, max_pool, wide>: three blocks a multiprocessor where accesses are 16 bytes wide, else two
    Promise(r"tap_pixels<\w+, true, true, \w+>", 80, loads=True, stores=True),
    Promise(r"tap_pixels<\w+, false, true, \w+>", 80, loads=True),
    Promise(r"tap_pixels_backward<\w+, \w+, true>", 80, stores=True),
    Promise(r"tap_pixels(_backward)?<\w+, \w+, false(, \w+)?>", 128),
    # NCHW <T, max_pool, path, mask>, backward <T, max_pool, path>; paths 0 wide, 1 narrow, 2 staged: three blocks but for the narrow ones
    Promise(rf"tap_planes<\w+, \w+, {PATH}0, \w+>", 80, loads=True),
    Promise(rf"tap_planes_backward<\w+, \w+, {PATH}0>", 80, stores=True),
    Promise(rf"tap_planes(_backward)?<\w+, \w+, {PATH}2(, \w+)?>", 80, copies=True, stores=True),
    Promise(rf"tap_planes(_backward)?<\w+, \w+, {PATH}1(, \w+)?>", 128),
)
"""Read from the top, the first row whose pattern is found in a kernel's demangled name holds."""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_their_promises(kernels, architecture):
    mine = [k for k in kernels if k.architecture == architecture]
    assert bool(mine) == bool(KERNEL_FILES)
    found = [text for kernel in mine for text in complaints(kernel, PROMISES)]
    assert not found, "\n".join(found)


@pytest.mark.slow
def test_machine_code_was_read(kernels):
    if disassembler() is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton: registers and spills are checked, machine code is not")
    assert all(kernel.count("EXIT") for kernel in kernels)


@pytest.mark.slow
def test_every_row_of_the_table_speaks_of_a_kernel(kernels):
    for promise in PROMISES:
        assert any(re.search(promise.kernel, k.name) for k in kernels), promise


# --- that the checks can fail -----------------------------------------------------------------------------------------------
BAD = {
    "spills": (
        "__global__ void __launch_bounds__(1024, 2) bad(const float* x, float* y) { float v[64]; for (int i = 0; i < 64; ++i) v[i] = x[i * 64 + threadIdx.x];"
        " for (int r = 0; r < 9; ++r) for (int i = 0; i < 64; ++i) v[i] = v[i] * v[(i * 7 + 3) % 64] + v[(i + r) % 64];"
        " for (int i = 0; i < 64; ++i) y[i * 64 + threadIdx.x] = v[i]; }",
        ("spills", "accesses to local memory"),
    ),
    "float_atomic": ("__global__ void __launch_bounds__(256) bad(const float* x, float* y) { atomicAdd(y, x[threadIdx.x]); }", ("atomics on floating",)),
    "narrow": (
        "__global__ void __launch_bounds__(256) bad(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }",
        ("no 16-byte loads", "no 16-byte stores", "no 16-byte copies into shared memory", "no matrix instructions"),
    ),
    "good": (
        "__global__ void __launch_bounds__(256) bad(const float4* x, float4* y, unsigned* n) { y[threadIdx.x] = x[threadIdx.x]; atomicAdd(n, 1u); }",
        ("no 16-byte copies into shared memory", "no matrix instructions"),
    ),
}


@needs_nvcc
@pytest.mark.parametrize("name", BAD)
def test_a_bad_kernel_is_refused(name, tmp_path):
    program = disassembler()
    if program is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton")
    code, expected = BAD[name]
    source, cubin = tmp_path / "bad.cu", tmp_path / "bad.cubin"
    source.write_text(code)
    done = subprocess.run([TOOLKIT.nvcc, "-cubin", "-arch=sm_90", "-Xptxas=-v", "-std=c++20", source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (kernel,) = kernels_of(done.stderr, cubin, program)
    found = complaints(kernel, [Promise("bad", 255, loads=True, stores=True, copies=True, tensor_cores=True)])
    for text in expected:
        assert any(text in line for line in found), found
    if name == "good":
        assert len(found) == 2
    assert any("registers" in line for line in complaints(kernel, [Promise("bad", 4)]))
    assert any("no row" in line for line in complaints(kernel, []))


def test_a_copy_to_a_sum_with_a_uniform_register_is_refused():
    """As ptxas writes it for sm_90 where the copy has a cache policy: the code before computes UR10 and UR11."""
    copies = {
        "[R20+UR0+0x400], desc[UR1][R18.64]": "LDGSTS.E.BYPASS.128+UR",
        "[R25+0x810], desc[UR6][R18.64]": "LDGSTS.E.BYPASS.128",
    }
    for operands, opcode in copies.items():
        assert counted(Instruction(0x1690, "", "LDGSTS.E.BYPASS.128", operands, None, frozenset())) == opcode
        found = complaints(Kernel("bad", "90a", opcodes={opcode: 2}), [Promise("bad", 255)])
        assert found == (["bad for sm_90a: 2 copies whose shared address is a sum with a uniform register"] if opcode.endswith("+UR") else [])


def test_float_atomics_by_name():
    from cuda_code import FLOAT_ATOMIC

    for bad in ("RED.E.ADD.F32.FTZ.RN.STRONG.GPU", "ATOMG.E.ADD.F16x2.RN.STRONG.GPU", "REDG.E.ADD.F64.RN.STRONG.GPU", "ATOM.E.ADD.BF16_V2"):
        assert re.fullmatch(FLOAT_ATOMIC, bad), bad
    for good in ("RED.E.ADD.STRONG.GPU", "ATOMG.E.ADD.STRONG.GPU", "ATOMG.E.CAS.64.STRONG.GPU", "FADD.F32", "REDUX.SUM"):
        assert not re.fullmatch(FLOAT_ATOMIC, good), good


# --- the source ---------------------------------------------------------------------------------------------------------
def test_kernel_files_keep_to_the_common_language():
    found = [text for f in (*KERNEL_FILES, *sorted(ROOT.glob("csrc/*/cuda/*.cuh"))) for text in forbidden(f.name, f.read_text())]
    assert not found, "\n".join(found)
    torch_headers = [f.name for f in KERNEL_FILES if re.search(r"#include\s*<torch/", f.read_text())]
    assert not torch_headers


def test_what_the_source_check_finds():
    good = "__global__ void __launch_bounds__(256) k(const __grid_constant__ P p) {} // asm <<< __shared__"
    assert forbidden("a.cu", good) == []
    for bad in ("k<<<1, 2>>>();", "__shared__ int x[4];", 'asm("exit;");', "__global__ void k(P p) {}", "template <class T>\n__global__ void k(P p);"):
        assert len(forbidden("a.cu", bad)) == 1, bad
    assert forbidden("ptx.cuh", 'asm("exit;");') == []


def test_a_log_is_read():
    log = """ptxas info    : Compiling entry function '_Z3badv' for 'sm_90a'
ptxas info    : Function properties for _Z3badv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers"""
    assert parse_log(log) == [Kernel("_Z3badv", "90a", 40, 8, 28)]
