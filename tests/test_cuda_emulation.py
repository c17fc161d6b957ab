"""The host emulation of the CUDA part: right kernels give right results in every order, and each kind of mistake is caught and named."""

import subprocess
import sys
from types import SimpleNamespace

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit, assert_caught, emulated

SAMPLE = [cuda_emulation.HERE / "sample/sample.cpp", cuda_emulation.HERE / "sample/sample.cu"]
FILE = "tests/cuda_emulation/sample/sample.cu"

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)


@pytest.fixture(scope="module")
def sample() -> SimpleNamespace:
    return cuda_emulation.load(SAMPLE)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("blocks", [1, 2, 7])
@pytest.mark.parametrize(("kernel", "rows"), [("sums", 13), ("last", 13), ("last", 1), ("tickets", 13), ("tickets", 1)])
def test_results_are_the_same_in_every_order(sample, kernel, rows, blocks):
    x = numbers(rows, 100)
    want = x.sum(1) if kernel == "sums" else x.sum().view(1)
    for seed in range(20):
        with emulated(sample, blocks, seed):
            assert torch.equal(sample.ops.sample(x, kernel), want), seed


def test_matrix_instruction(sample):
    x = numbers(24, 8)
    assert torch.equal(sample.ops.sample(x, "product"), x[:16] @ x[16:])
    x = torch.rand(24, 8) + 1
    short = (x.view(torch.int32) + 0x1000 & -0x2000).view(torch.float32).double()
    torch.testing.assert_close(sample.ops.sample(x, "product").double(), short[:16] @ short[16:], rtol=1e-7, atol=0)


def test_lanes(sample):
    x = torch.randn(1, 32)
    down, reversed_, flipped, positive, negative, tf32 = sample.ops.sample(x, "lanes")
    x = x[0]
    assert torch.equal(down, torch.cat([x[3:], x[-3:]]))
    assert torch.equal(reversed_, x.flip(0))
    assert torch.equal(flipped, x[torch.arange(32) ^ 5])
    assert (positive == (x > 0).sum()).all() and (negative == (x < 0).sum()).all()
    assert torch.equal(tf32.view(torch.int32) & 0x1FFF, torch.zeros(32, dtype=torch.int32))
    assert ((tf32 - x).abs() <= x.abs() * 2**-11).all()


@pytest.mark.parametrize("blocks", [1, 3])
def test_asynchronous_copies(sample, blocks):
    x = numbers(500, 4)
    for seed in range(5):
        with emulated(sample, blocks, seed):
            assert torch.equal(sample.ops.sample(x, "copies"), x.sum(1))
        assert cuda_emulation.copies_of_last_launch(sample) == 500
        assert cuda_emulation.shared_bytes_of_last_launch(sample) == 64 * 16


def test_order_repeats_from_the_seed(sample):
    def order(seed: int) -> int:
        with emulated(sample, 7, seed):
            sample.ops.sample(torch.ones(13, 100), "tickets")
        return cuda_emulation.order_of_last_launch(sample)

    assert order(3) == order(3)
    assert len({order(seed) for seed in range(10)}) == 10


def test_nothing_is_taken_from_another_call(sample):
    """Memory that torch hands out again is judged anew."""
    for rows in (5, 40, 3, 17):
        x = numbers(rows, 50)
        for _ in range(3):
            x = sample.ops.sample(x, "sums").view(-1, 1)
        assert torch.equal(x[:, 0], sample.ops.sample(x, "sums"))


ROW_SUM = "  float sum = row_sum(P, blockIdx.x);"  # in sums_kernel
# Mistakes: kernel, blocks, edits, what the launch says. Those of one list share a library, so that few are built.
MISTAKES = {
    "order": [
        ("product", 1, [("  __syncwarp();\n", "")], r"reads byte \d+ of shared memory, never written, at sample.cu:\d+"),
        ("last", 7, [("atomic_add_acq_rel(P.counters, 1)", "atomic_add_relaxed(P.counters, 1)")], "no release and acquire order the two"),
        ("tickets", 7, [("atomic_add_release(P.counters + 1, 1)", "atomic_add_relaxed(P.counters + 1, 1)")], "no release and acquire order the two"),
        ("sums", 2, [("P.y[blockIdx.x] = sum", "P.y[0] = sum")], r"writes byte 0 of output.*which block \d+ thread 0 writes at sample.cu"),
    ],
    "progress": [
        (
            "tickets",
            1,
            [("== tickets - 1;", "== 0;"), ("row_sum(P, ticket)", "row_sum(P, ticket - 1)"), ("P.partial[ticket]", "P.partial[ticket - 1]")],
            r"deadlock, nobody can go on: block 0 thread 0 waits for a word that stays 0 \(sample.cu:\d+\)",
        ),
        ("last", 7, [("    store_relaxed(P.counters, 0);\n", "")], "counter 0 is 7 after the launch, and must be zero again"),
        ("product", 1, [("P.x + i * 4,", "P.x + 1 + i * 4,")], r"a read of 16 bytes at byte \d+ of input \[24, 8\] of Float, which is not aligned to 16"),
        ("sums", 2, [("P.y[blockIdx.x] = sum", "const_cast<float*>(P.x)[blockIdx.x] = sum")], r"writes byte \d+ of input \[13, 100\] of Float, an input"),
    ],
    "barrier of the writers": [
        ("sums", 1, [("  __syncthreads();  // partial sums are there\n", "")], r"shared memory.*(never written|no barrier orders the two)"),
        ("product", 1, [("i < 48;", "i < 47;")], r"reads byte 7\d\d of shared memory, never written"),
    ],
    "a wait": [
        ("copies", 1, [("    wait_for_copies();\n", "")], r"of shared memory, never written|has not waited for the copy that it began at sample.cu"),
    ],
    "barrier of the copies": [
        ("copies", 2, [("    __syncthreads();  // copies are there\n", "")], r"reads byte \d+ of shared memory.*(never written|no barrier orders the two)"),
        ("product", 1, [("  __syncwarp();\n", "  copy_async<16>(shared + 1, P.x);\n")], "an asynchronous copy of 16 .* not aligned to 16"),
    ],
    "barrier of the readers": [
        (
            "copies",
            1,
            [("    __syncthreads();  // copies are read\n", "")],
            r"of shared memory.*(never written|no barrier orders the two)",
        ),
        (
            "sums",
            1,
            [("  __syncthreads();  // and read by everybody\n", ""), (ROW_SUM, f"  row_sum(P, 0);\n{ROW_SUM}")],
            "shared memory.*no barrier orders the two",
        ),
    ],
    "barrier of the release": [
        ("last", 7, [("  __syncthreads();  // rows are written\n", "")], r"which block \d thread 5 writes at"),
        ("product", 1, [("  __syncwarp();\n", "  __syncwarp(lane < 8 ? 0xff : ~0xffu);\n")], "with a mask that leaves out lanes"),
    ],
    "barriers that meet": [
        (
            "tickets",
            2,
            [("      __syncthreads();  // everybody", "      if (threadIdx.x < 40) __syncthreads();  // everybody")],
            r"comes to __syncthreads of line \d+, while thread \d+ waits at the one of line \d+",
        ),
        (
            "last",
            2,
            [("  __syncthreads();  // the verdict", "  if (threadIdx.x == 40) return;\n  __syncthreads();  // the verdict")],
            "returns, while thread|thread 40 never comes",
        ),
        ("sums", 2, [(ROW_SUM, f"  if (threadIdx.x == 5) return;\n{ROW_SUM}")], "returns, while|for lane 5 of its warp, which returned"),
        ("product", 1, [("2 * j + i % 2] = c[i]", "2 * j + i % 2 + 1] = c[i]")], r"writes 4 bytes at sample.cu:\d+, 0 bytes beyond the end of output"),
    ],
    "caches and atomics": [
        ("last", 7, [("load_shared_result(P.partial + row)", "load_stream<float>(P.partial + row, 0)")], "with load_stream, which is for what no block of"),
        ("tickets", 7, [("store_relaxed(P.counters, 0), store_relaxed", "*P.counters = 0, store_relaxed")], "which block . thread 0 changes by an atomic"),
        ("product", 1, [("float c[4] = {};", "float c[4] = {shared[192]};")], "0 bytes beyond the end of shared memory"),
        ("sums", 1, [(ROW_SUM, "  float sum = threadIdx.x % 2 ? 0 : row_sum(P, blockIdx.x);")], r"returns, while lane \d+|for lane \d+ of its warp, which"),
    ],
}


@pytest.mark.parametrize("group", MISTAKES)
def test_mistakes_are_caught(group):
    edits = [Edit(FILE, old, new) for _, _, pairs, _ in MISTAKES[group] for old, new in pairs]
    mutant = cuda_emulation.load(SAMPLE, list(dict.fromkeys(edits)))
    for kernel, blocks, _, says in MISTAKES[group]:
        x = numbers(24, 8) if kernel == "product" else numbers(500, 4) if kernel == "copies" else numbers(13, 100)
        where = "" if says.startswith("counter") else r"block \d+ thread \d+: .*"
        assert_caught(mutant, lambda ops, x=x, kernel=kernel: ops.sample(x, kernel), f"sample: {kernel}_kernel: {where}(?:{says})", blocks)


def test_a_launch_after_a_fault_is_right_again(sample):
    with emulated(sample, 7, 1):
        with pytest.raises(RuntimeError, match=r"bytes beyond the end of|outside"):
            sample.ops.sample(numbers(23, 8), "product")
        test_results_are_the_same_in_every_order(sample, "tickets", 13, 7)


ASAN = """
import torch, cuda_emulation as e
from test_cuda_emulation import FILE, SAMPLE, BESIDE
library = e.load(SAMPLE, asan=True)
x = torch.ones(13, 100)
for blocks in (1, 2, 7):
    with e.emulated(library, blocks, 5):
        for kernel in ("sums", "last", "tickets"):
            assert library.ops.sample(x, kernel).sum() == 1300
assert (library.ops.sample(torch.ones(24, 8), "product") == 8).all()
print("good", flush=True)
e.load(SAMPLE, [BESIDE], asan=True).ops.sample(x, "sums")
"""
BESIDE = Edit(FILE, "float total = shared[0] + shared[1];", "float total = shared[0] + shared[1] + 0 * shared[30];")


@pytest.mark.slow
def test_address_sanitizer():
    """The same sources under ASan, which sees what lies beside tensors and shared memory without knowing of either."""
    environment = cuda_emulation.asan_environment()
    if environment is None:
        pytest.skip("the compiler has no AddressSanitizer")
    cuda_emulation.build(tuple(SAMPLE), asan=True)
    cuda_emulation.build(tuple(SAMPLE), (BESIDE,), asan=True)
    ran = subprocess.run([sys.executable, "-c", ASAN], env=environment, capture_output=True, text=True)
    assert ran.stdout == "good\n", ran.stdout + ran.stderr[-3000:]
    assert "heap-buffer-overflow" in ran.stderr and "row_sum" in ran.stderr, ran.stderr[-3000:]
