"""The CUDA stage tap's NCHW units in shared memory, under the host emulation: who takes that way, with the narrow kernels' bits, and mistakes on it."""

import itertools

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit, assert_caught, copies_of_last_launch, emulated, shared_bytes_of_last_launch
from test_cuda_stage_tap import DTYPES, FORMS, FORWARD_SOURCES, ONLY_BF16, assert_all_same, cpu_tap, displaced, is_nhwc, upstreams

from interflow_kernels.testing import LAYOUTS, TapCase, in_layout, tap_inputs

if reason := cuda_emulation.why_not():
    pytest.skip(reason, allow_module_level=True)

PLAN = "csrc/stage_tap/cuda/plan.h"
NEVER_STAGED = Edit(PLAN, "if (u * size <= kTapStagedBytes && ", "if (false && ")
BOTH = ("forward", "backward")
MOST_SHARED = min(100 * 1024 // 2, 164 * 1024 // 3) - 1024  # two blocks on the smallest GPUs, three on sm_80, each with the 1 KB that the system takes


@pytest.fixture(scope="module")
def library():
    return cuda_emulation.load(cuda_emulation.operator_sources())


@pytest.fixture(scope="module")
def unstaged():
    return cuda_emulation.load(cuda_emulation.operator_sources(), [NEVER_STAGED])


def run(library, u, shift, max_pool, dm, dp, grid=(7, 0), mask_by=0):
    """(m, p, mask, du, dshift), and which of forward and backward copied units into shared memory."""
    with emulated(library, *grid):
        m, p, mask = library.ops.stage_tap(u, shift, max_pool, True)
        forward = copies_of_last_launch(library)
        du, dshift = library.ops.stage_tap_backward(dm, dp, displaced(mask, mask_by), u, max_pool, is_nhwc(u), True)
        backward = copies_of_last_launch(library)
    return (m, p, mask, du, dshift), tuple(name for name, copies in zip(BOTH, (forward, backward), strict=True) if copies)


def inputs(shape, dtype, max_pool, layout="contiguous"):
    u, shift = tap_inputs(TapCase(shape, dtype, layout, max_pool, shift="own", special=True))
    return u, shift, *upstreams(u, max_pool)


# --- the same bits ----------------------------------------------------------------------------------------------------------------
# Slabs that do not divide C, several units a block, several rounds of planes, parts of large planes.
RAGGED = [(2, 37, w + 1, w) for w in (1, 2, 3, 4, 5, 6, 7, 9)]
RAGGED += [(3, 37, 14, 14), (2, 19, 28, 28), (2, 2100, 2, 2), (2, 5, 1, 13), (1, 2, 231, 71), (1, 2, 21, 1500)]


def is_ragged(shape, dtype, max_pool):
    return bool(shape[3] % (16 // dtype.itemsize) if max_pool else shape[2] * shape[3] % 8)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ragged_maps_are_staged_and_have_the_bits_of_the_narrow_kernels(library, unstaged, dtype, max_pool):
    for shape in RAGGED:
        u, shift, dm, dp = inputs(shape, dtype, max_pool)
        expected, by = run(unstaged, u, shift, max_pool, dm, dp, (2, 1))
        assert by == ()
        for grid in ((1, 0), (3, 2)):
            actual, by = run(library, u, shift, max_pool, dm, dp, grid)
            assert by == (BOTH if is_ragged(shape, dtype, max_pool) else ()), shape
            assert_all_same(f"of {shape} with {grid} blocks and seed", actual, expected)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_maps_have_the_same_bits_at_every_address(library, dtype, max_pool):
    """What does not fill 16 bytes lies at both ends of u, dm and the mask; the emulation fails an access beside them."""
    for shape in ((2, 5, 7, 7), (2, 5, 6, 6)):
        u, shift, dm, dp = inputs(shape, dtype, max_pool)
        expected, _ = run(library, u, shift, max_pool, dm, dp)
        for by in range(1, 16 // dtype.itemsize):
            actual, way = run(library, *(displaced(t, by) for t in (u, shift)), max_pool, displaced(dm, by), displaced(dp, by), mask_by=by)
            assert way == BOTH
            assert_all_same(f"displaced by {by}", actual, expected)
        for by in (8, 13, 15):
            assert_all_same(f"with a mask displaced by {by}", run(library, u, shift, max_pool, dm, dp, mask_by=by)[0], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_wide_rows_at_a_wrong_address_have_the_bits_of_the_wide_kernel(library, dtype):
    for shape, staged in (((2, 37, 8, 8), True), ((2, 16, 6, 16), True), ((1, 3, 112, 112), False)):  # units that fit, and that do not
        u, shift, dm, dp = inputs(shape, dtype, True)
        expected, by = run(library, u, shift, True, dm, dp)
        assert by == ()
        actual, by = run(library, displaced(u, 1), shift, True, dm, dp, mask_by=1)
        assert by == (BOTH if staged else ()), shape
        assert_all_same(f"of {shape} displaced", actual, expected)


def test_channels_of_a_larger_map(library):
    """Dense planes, whose images do not follow each other."""
    u, shift, dm, dp = inputs((3, 9, 14, 14), torch.bfloat16, True)
    expected, _ = run(library, u, shift, True, dm, dp)
    larger, larger_dm = torch.full((3, 12, 14, 14), torch.nan, dtype=u.dtype), torch.full((3, 12, 7, 7), torch.nan, dtype=u.dtype)
    part, part_dm = larger[:, 2:11].copy_(u), larger_dm[:, 1:10].copy_(dm)
    actual, by = run(library, part, shift, True, part_dm, dp)
    assert by == BOTH
    assert_all_same("of channels of a larger map", actual, expected)


# --- who takes which way ------------------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_dense_planes_are_staged(library, layout, max_pool):
    """du is always dense, so backward is staged where rows are ragged, whatever u was."""
    u, shift, dm, dp = inputs((2, 6, 7, 9), torch.bfloat16, max_pool, layout)
    _, by = run(library, u, shift, max_pool, dm, dp)
    dense = u.stride(3) == 1 and u.stride(2) == 9 and u.stride(1) == 63
    assert by == (() if is_nhwc(u) else BOTH if dense else ("backward",))
    wide = in_layout(torch.randn(2, 6, 8, 16).bfloat16(), layout)
    assert run(library, wide, shift, max_pool, *upstreams(wide, max_pool))[1] == ()


@FORMS
def test_blocks_have_room_on_every_gpu(library, max_pool):
    sizes = [(n, n) for n in (2, 3, 4, 5, 6, 7, 9, 10, 11, 13, 14, 20, 27, 28, 30, 61, 90, 91, 119, 120, 255)]
    sizes += [(1, 2), (2, 1), (3, 1), (1, 500), (500, 3), (2, 4094)]
    staged = 0
    for (height, width), dtype in itertools.product(sizes, (torch.bfloat16, torch.float32)):
        u = torch.zeros(1, max(1, 60000 // (height * width)), height, width, dtype=dtype)
        with emulated(library, 1):
            mask = library.ops.stage_tap(u, None, max_pool, True)[2]
            forward = shared_bytes_of_last_launch(library) if copies_of_last_launch(library) else 0
            library.ops.stage_tap_backward(None, None, mask, u, max_pool, False, True)
            backward = shared_bytes_of_last_launch(library) if copies_of_last_launch(library) else 0
        assert max(forward, backward) <= MOST_SHARED, (height, width, dtype, forward, backward)
        staged += bool(forward)
    assert staged >= 30


# --- mistakes -------------------------------------------------------------------------------------------------------------------------
PLANES, BACKWARD = "csrc/stage_tap/cuda/forward_planes.cuh", "csrc/stage_tap/cuda/backward_planes.cuh"
MUTANT = [  # all in one library, each for maps of its own
    ONLY_BF16,
    Edit(PLANES, "if constexpr (kStaged) wait_for_copies();", "if (kStaged && s.height != 3) wait_for_copies();"),
    Edit(PLANES, "__syncthreads();  // the unit is there", "if (s.height != 5) __syncthreads();  // the unit is there"),
    Edit(
        PLANES,
        "    __syncthreads();  // sums, m and the mask are complete",
        "    if (kStaged && s.height == 7) start_unit<T>(P, buffers, unit + gridDim.x);\n    if (s.height != 9) __syncthreads();  //",
    ),
]
UNREAD = r"reads byte \d+ of shared memory.*never written, at (tile|forward_planes|backward_planes|staging|block_sums)"
UNORDERED = r"of shared memory at \w+\.cuh:\d+, which block 0 thread \d+ (reads|writes) at \w+\.cuh:\d+: no barrier orders the two"


@pytest.mark.parametrize(
    ("height", "says"),
    [
        (3, f"{UNREAD}|has not waited for the copy that it began at staging"),
        (5, f"{UNREAD}|{UNORDERED}"),
        (7, f"{UNREAD}|{UNORDERED}"),
        (9, f"{UNREAD}|{UNORDERED}"),
        (11, None),
    ],
    ids=["the wait left out", "the barrier behind it left out", "the next unit's copy before the barrier", "that barrier left out", "none"],
)
def test_a_mistake_is_caught(height, says):
    mutant = cuda_emulation.load(FORWARD_SOURCES, MUTANT)
    u = torch.randn(4, 40, height, 14).bfloat16()  # several units for the one block
    if says:
        assert_caught(mutant, lambda ops: ops.stage_tap(u, None, True, True), f"stage_tap: the forward kernel: .*(?:{says})", blocks=1)
    else:
        with emulated(mutant, 1):
            mutant.ops.stage_tap(u, None, True, True)
        assert copies_of_last_launch(mutant) > 0


BACKWARD_FILES = ("library.cpp", "common/cuda/host.cpp", "stage_tap/cuda/backward.cpp", "stage_tap/cuda/plan.cpp", "stage_tap/cuda/backward.cu")
BACKWARD_MUTANT = [
    Edit("csrc/stage_tap/cuda/backward.cu", ONLY_BF16.old, ONLY_BF16.new),
    Edit(BACKWARD, "if constexpr (kStaged) wait_for_copies();", "if (kStaged && s.height != 3) wait_for_copies();"),
    Edit(
        BACKWARD,
        "    __syncthreads();  // sums and du are complete",
        "    if (kStaged && s.height == 7) start_unit<T, kPool>(P, buffers, dp, unit + gridDim.x);\n    __syncthreads();  //",
    ),
]


@pytest.mark.parametrize(
    ("height", "says"),
    [(3, f"{UNREAD}|has not waited for the copy that it began at (staging|backward_planes)"), (7, f"{UNREAD}|{UNORDERED}"), (9, None)],
    ids=["the wait left out", "the next unit's copy before the barrier", "none"],
)
def test_a_mistake_in_backward_is_caught(height, says):
    mutant = cuda_emulation.load([cuda_emulation.ROOT / "csrc" / name for name in BACKWARD_FILES], BACKWARD_MUTANT)
    u = torch.randn(4, 40, height, 14).bfloat16()
    dm, dp = upstreams(u, True)
    mask = cpu_tap(u, None, True, True)[2]
    if says:
        assert_caught(mutant, lambda ops: ops.stage_tap_backward(dm, dp, mask, u, True, False, True), f"the backward kernel: .*(?:{says})", blocks=1)
    else:
        with emulated(mutant, 1):
            mutant.ops.stage_tap_backward(dm, dp, mask, u, True, False, True)
        assert copies_of_last_launch(mutant) > 0
