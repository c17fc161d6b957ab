"""The CUDA stage end beside the CPU's: under the host emulation on CPU tensors, and by the same tests on a GPU where there is one.

v and du to the bit, p and dshift within the tolerance table of fp64. The emulation also fails a launch for a race, a misaligned or stray
access, a byte of an output that nobody wrote, and a counter that does not come back to zero.
"""

import itertools

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit, emulated
from stage_end_cases import ACTIVATIONS, raw_end, raw_end_backward, upstreams
from test_cuda_stage_tap import DTYPES, EmulatedTap, GpuTap, displaced

from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import (
    LAYOUTS,
    EndCase,
    assert_close,
    assert_same_bits,
    composed_end,
    composed_end_gradient,
    end_inputs,
    exact_end_gradient,
    in_layout,
)

NAMES = ("v", "p", "du", "dshift")
QUICK = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


class EmulatedEnd(EmulatedTap):
    def __init__(self):
        super().__init__()
        self.end, self.end_backward = self.library.ops.stage_end, self.library.ops.stage_end_backward


class GpuEnd(GpuTap):
    def __init__(self):
        super().__init__()
        self.end, self.end_backward = torch.ops.interflow_kernels.stage_end, torch.ops.interflow_kernels.stage_end_backward


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu":
        return GpuEnd()
    if reason := cuda_emulation.why_not():
        pytest.skip(reason)
    return EmulatedEnd()


def ended(device, inputs, activation, dv, dp, grid=(7, 0)):
    """v, p, du, dshift of the device, on the CPU, strides kept."""
    there = [device.there(t) for t in inputs]
    with device.run(*grid):
        v, p = device.end(*there, activation)
        du, dshift = device.end_backward(device.there(dv), device.there(dp), v if activation == "relu" else None, there[0], is_channels_last(inputs[0]), True)
    return [t.cpu() for t in (v, p, du, dshift)]


def check(device, case, grid=(7, 0), use=("dv", "dp")):
    inputs = u, shift, residual = end_inputs(case)
    dv, dp = upstreams(tuple(u.shape), u.dtype)
    dv, dp = dv if "dv" in use else None, dp if "dp" in use else None
    v, p, du, dshift = ended(device, inputs, case.activation, dv, dp, grid)
    expected = composed_end(u, shift, residual, case.activation)
    assert_same_bits("v", v, expected)
    v_cpu, _ = raw_end(*inputs, case.activation)
    du_cpu, _ = raw_end_backward(dv, dp, v_cpu if case.activation == "relu" else None, u, is_channels_last(u), True)
    assert_same_bits("du", du, du_cpu)
    assert (v.stride(), du.stride()) == (v_cpu.stride(), du_cpu.stride())
    if len(use) == 1 or (u.dtype == torch.float32 and use):
        assert_same_bits("du of PyTorch's composition on the CPU", du, composed_end_gradient(u, shift, residual, case.activation, dv, dp))
    assert_close("p", p, expected.double().mean((2, 3)), magnitude=expected.double().abs().mean((2, 3)))
    wanted, size = (
        exact_end_gradient(expected, case.activation, *(None if g is None else f(g) for g in (dv, dp))).sum((0, 2, 3)) for f in (lambda g: g, torch.abs)
    )
    assert_close("dshift", dshift, wanted, magnitude=size)


def assert_all_same(what, actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(f"{name} {what}", a, e)


# --- values -------------------------------------------------------------------------------------------------------------------
@ACTIVATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_dtypes_layouts_shifts(device, dtype, layout, activation):
    for shape, shift, special in itertools.product(((2, 19, 9, 13), (2, 16, 6, 16)), ("none", "own", "fp32", "strided"), (False, True)):
        residual = {"none": "none", "own": layout, "fp32": "contiguous", "strided": "channels_last"}[shift]
        check(device, EndCase(shape, dtype, layout, activation, shift, residual, special))


@ACTIVATIONS
@BOTH
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_sizes(device, dtype, layout, activation):
    for height, width in itertools.product(range(1, 10), range(1, 10)):
        residual = "none" if (height * width) % 3 == 0 else layout
        check(device, EndCase((2, 8 if (height + width) % 2 else 5, height, width), dtype, layout, activation, residual=residual, special=True))
    for channels in range(1, 34):
        check(device, EndCase((2, channels, 3, 4), dtype, layout, activation, residual=layout, special=True))


# The ends of stages of ResNet-50 at 224, cut down in channels; several slabs, several parts of a map, several images a unit, planes that
# fill whole chunks only together, planes smaller than a chunk, rows of sums that meet twice.
LARGER = {
    "channels_last": [(1, 264, 7, 7), (2, 64, 28, 28), (1, 520, 12, 13), (3, 24, 2, 3), (66, 264, 2, 2)],
    "contiguous": [(1, 200, 7, 7), (2, 37, 7, 7), (2, 48, 14, 14), (1, 13, 28, 28), (1, 3, 56, 56), (1, 2, 264, 258), (70, 3, 1, 3), (1, 9, 57, 55)],
    "cropped": [(1, 2, 132, 131)],
    "permuted": [(1, 6, 40, 30)],
}


@pytest.mark.parametrize("layout", list(LARGER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger(device, dtype, layout):
    for i, shape in enumerate(LARGER[layout]):
        check(device, EndCase(shape, dtype, layout, "none" if i % 3 == 2 else "relu", residual="none" if i % 2 else layout))


@pytest.mark.parametrize("use", [("dv",), ("dp",), ()], ids=str)
@BOTH
def test_missing_gradients(device, layout, use):
    for shape, dtype, activation in itertools.product(((2, 19, 9, 13), (2, 16, 6, 16)), DTYPES, ("relu", "none")):
        check(device, EndCase(shape, dtype, layout, activation, special=True), use=use)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_maps_do_not_drift(device, dtype):
    for layout in ("contiguous", "channels_last"):
        u = in_layout(torch.full((1, 8, 90, 96), 0.7).to(dtype), layout)
        _, p, _, dshift = ended(device, (u, None, None), "relu", torch.full_like(u, 0.3), torch.ones(1, 8))
        assert_close("p", p, u.double().mean((2, 3)))
        assert_close("dshift", dshift, torch.full_like(u, 0.3).double().sum((0, 2, 3)) + 1)


@BOTH
def test_images_far_apart(device, layout):
    """Offsets beyond 2^31 elements; nobody touches the memory between."""
    inputs = end_inputs(EndCase((2, 16, 6, 8), torch.bfloat16, layout, residual=layout))
    dv, dp = upstreams((2, 16, 6, 8), torch.bfloat16)
    dv = in_layout(dv, layout)
    expected = ended(device, inputs, "relu", dv, dp)
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device.name)
    far = lambda t: memory.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)  # noqa: E731
    with device.run(7, 0):
        v, p = device.end(far(inputs[0]), *map(device.there, inputs[1:]), "relu")
        du, dshift = device.end_backward(far(dv), device.there(dp), v, v, layout == "channels_last", True)
    assert_all_same("of images far apart", [t.cpu() for t in (v, p, du, dshift)], expected)


# --- bits ---------------------------------------------------------------------------------------------------------------------
CASES = [
    EndCase((3, 40, 14, 16), torch.bfloat16, "channels_last", residual="channels_last"),
    EndCase((1, 264, 31, 29), torch.bfloat16, "channels_last", residual="none"),
    EndCase((3, 20, 14, 16), torch.float32),
    EndCase((1, 2, 264, 258), torch.float32, residual="none"),
    EndCase((3, 80, 14, 14), torch.bfloat16),
    EndCase((3, 80, 7, 7), torch.bfloat16),
    EndCase((3, 40, 7, 9), torch.float32, "channels_last", "none"),
    EndCase((70, 3, 4, 6), torch.float16, residual="none"),
    EndCase((5, 6, 1, 3), torch.float16),
]


def case_id(case):
    return f"{case.layout}-{'x'.join(map(str, case.shape))}-{case.activation}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits_do_not_depend_on_the_grid(device, case):
    inputs, upstream = end_inputs(case), upstreams(case.shape, case.dtype)
    first, *others = [ended(device, inputs, case.activation, *upstream, grid) for grid in device.grids]
    for grid, other in zip(device.grids[1:], others, strict=True):
        assert_all_same(f"with {grid} blocks and seed", other, first)


@pytest.mark.parametrize("case", [c for c in CASES if c.shape[0] > 1], ids=case_id)
def test_an_image_does_not_depend_on_its_batch(device, case):
    u, shift, residual = end_inputs(case)
    dv, dp = upstreams(case.shape, case.dtype)
    v, p, du, _ = ended(device, (u, shift, residual), case.activation, dv, dp)
    for chosen in ([0], [2, 0], [2, 1, 1, 0, 2]):
        part = in_layout(u[chosen], case.layout), shift, None if residual is None else in_layout(residual[chosen], case.residual)
        v2, p2, du2, _ = ended(device, part, case.activation, dv[chosen], dp[chosen])
        for name, a, e in (("v", v2, v[chosen]), ("p", p2, p[chosen]), ("du", du2, du[chosen])):
            assert_same_bits(f"{name} of images {chosen}", a, e)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_addresses_nor_on_strides(device, dtype, layout):
    """Wide, narrow and element by element: one order of sums."""
    for shape in ((2, 16, 6, 16), (2, 16, 7, 7), (2, 16, 6, 14), (1, 24, 20, 20)):
        u, shift, residual = end_inputs(EndCase(shape, dtype, layout, shift="own", residual=layout))
        dv, dp = upstreams(shape, dtype)
        dv = in_layout(dv, layout)
        expected = ended(device, (u, shift, residual), "relu", dv, dp)
        for by in (1, 2, 4):
            moved = [displaced(t, by) for t in (u, shift, residual)]
            assert_all_same(f"displaced by {by}", ended(device, moved, "relu", displaced(dv, by), displaced(dp, by)), expected)
        others = ("cropped", "permuted") if layout == "contiguous" else ("sliced",)
        for other in others:
            assert_all_same(f"of u that is {other}", ended(device, (in_layout(u, other), shift, residual), "relu", dv, dp), expected)
        for other in ("contiguous", "channels_last", "cropped", "sliced", "permuted"):
            moved = in_layout(residual, other)
            assert_all_same(
                f"of dv and residual that are {other}", ended(device, (u, shift, moved), "relu", in_layout(dv, other), dp.t().contiguous().t()), expected
            )
        for one in (dv[:1, :1, :1, :1], dv[:, :, :1, :1], dv[:1]):  # stride 0, as a sum or a mean gives
            each, p = one.expand_as(dv), dp[:1, :1].expand_as(dp)
            dense = ended(device, (u, shift, residual), "relu", in_layout(each.contiguous(), layout), p.contiguous())
            assert_all_same(f"of dv with strides {each.stride()}", ended(device, (u, shift, residual), "relu", each, p), dense)


# --- what comes back ------------------------------------------------------------------------------------------------------------
@ACTIVATIONS
def test_only_what_is_needed(device, activation):
    for case in (EndCase(activation=activation), EndCase((2, 16, 6, 16), torch.bfloat16, "channels_last", activation)):
        inputs, (dv, dp) = end_inputs(case), upstreams(case.shape, case.dtype)
        v, _, du, _ = ended(device, inputs, activation, dv, dp)
        value = device.there(v) if activation == "relu" else None
        with device.run(7, 0):
            alone, dshift = device.end_backward(device.there(dv), device.there(dp), value, device.there(inputs[0]), is_channels_last(inputs[0]), False)
        assert dshift.shape == (0,)
        assert_same_bits("du", alone.cpu(), du)


def test_nothing_to_do(device):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        v, p, du, dshift = ended(device, (torch.empty(shape), None, torch.empty(shape)), "relu", *upstreams(shape, torch.float32))
        assert (v.shape, p.shape, du.shape, dshift.tolist()) == (shape, shape[:2], shape, [0.0] * shape[1])


def test_errors(device):
    u, there = device.there(torch.randn(2, 3, 4, 5)), device.there
    for message, call in {
        r"stage_end: fp64 has no CUDA kernel": lambda: device.end(u.double(), None, None, "relu"),
        r"stage_end: u must be \[B, C, H, W\] .* got \[2, 3\]": lambda: device.end(u[:, :, 0, 0], None, None, "relu"),
        r"stage_end: activation must be 'relu' or 'none', got 'gelu'": lambda: device.end(u, None, None, "gelu"),
        r"stage_end: shift must be \[3\], got \[4\]": lambda: device.end(u, there(torch.zeros(4)), None, "relu"),
        r"stage_end: residual must be \[2, 3, 4, 5\], got": lambda: device.end(u, None, u[:1], "relu"),
        r"stage_end: residual must have the dtype of u": lambda: device.end(u, None, u.half(), "relu"),
        r"stage_end_backward: dv must be \[2, 3, 4, 5\], got": lambda: device.end_backward(u[:1], None, None, u, False, True),
        r"stage_end_backward: v must be \[2, 3, 4, 5\], got": lambda: device.end_backward(None, None, u[:1], u, False, True),
        r"stage_end_backward: dp must have p's dtype": lambda: device.end_backward(None, u[:, :, 0, 0].half(), None, u, False, True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


# --- mistakes -------------------------------------------------------------------------------------------------------------------
FILES = ("library.cpp", "common/cuda/host.cpp", "stage_end/cuda/forward.cpp", "stage_end/cuda/plan.cpp", "stage_end/cuda/forward.cu")
ONLY_BF16 = Edit(  # a third of the kernels to compile
    "csrc/stage_end/cuda/forward.cu",
    "    case DType::F16: return launch_for<__half>(P, stream);\n    default: return launch_for<float>(P, stream);\n",
    "    default: return cudaErrorNotSupported;\n",
)
PLANES = "csrc/stage_end/cuda/forward_planes.cuh"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit(PLANES, "    __syncthreads();\n    finish_means_of", "    finish_means_of"), "of shared memory, never written"),
        (Edit(PLANES, "if (first == 0) __syncthreads();", "if (first == 0 && plan.slots != 2) __syncthreads();"), "no barrier orders the two"),
    ],
    ids=["sums read before they are there", "sums written over those of the last unit"],
)
def test_a_mistake_is_caught(edit, message):
    if reason := cuda_emulation.why_not():
        pytest.skip(reason)
    mutant = cuda_emulation.load(cuda_emulation.sources(*FILES), [edit, ONLY_BF16])
    inputs = end_inputs(EndCase((3, 80, 14, 14), torch.bfloat16))
    with emulated(mutant, 1, 0), pytest.raises(RuntimeError, match=message):
        mutant.ops.stage_end(*inputs, "relu")
