"""The CUDA stage tap beside the CPU's: under the host emulation on CPU tensors, and by the same tests on a GPU where there is one.

m, the mask and du to the bit, p and dshift within the tolerance table of fp64. The emulation also fails a launch for a race, a
misaligned or stray access, a byte of an output that nobody wrote, and a counter that does not come back to zero.
"""

import itertools

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit, emulated

from interflow_kernels import _backend, backend
from interflow_kernels._tap_format import is_channels_last as is_nhwc
from interflow_kernels.testing import LAYOUTS, TapCase, assert_close, assert_same_bits, composed_tap, in_layout, tap_inputs

cpu_tap = torch.ops.interflow_kernels.stage_tap.default
cpu_tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])
NAMES = ("m", "p", "mask", "du", "dshift")


class EmulatedTap:
    """The operators on CPU tensors. run(blocks, seed): how many blocks run at once, and in which order."""

    name = "cpu"
    grids = ((1, 0), (2, 1), (7, 2), (7, 3), (16, 4))

    def __init__(self):
        self.library = cuda_emulation.load(cuda_emulation.operator_sources())
        self.tap, self.tap_backward = self.library.ops.stage_tap, self.library.ops.stage_tap_backward

    def run(self, blocks, seed):
        return emulated(self.library, blocks, seed)

    def there(self, t):
        return t


class GpuTap:
    name = "cuda"
    grids = ((0, 0),) * 5  # the launcher chooses; the order is the hardware's

    def __init__(self):
        reason = _backend.reason_against("native", "cuda", 0)
        if reason is not None:  # the raw operators would be Triton's
            raise RuntimeError(f"the CUDA kernels do not run here, so nothing tests them: {reason}")
        self.tap, self.tap_backward = torch.ops.interflow_kernels.stage_tap, torch.ops.interflow_kernels.stage_tap_backward

    def run(self, blocks, seed):
        return backend("native")

    def there(self, t):
        """The tensor on the GPU with the same strides and offset."""
        if t is None:
            return None
        whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
        return whole.cuda().as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.fixture(scope="module", params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "gpu":
        return GpuTap()
    if reason := cuda_emulation.why_not():
        pytest.skip(reason)
    return EmulatedTap()


def upstreams(u, max_pool, seed=3):
    """dm, dp: normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    batch, channels, height, width = u.shape
    dm = torch.randn(batch, channels, height // 2, width // 2, generator=generator).to(u.dtype) if max_pool else None
    return dm, torch.randn(batch, channels, generator=generator)


def tapped(device, u, shift, max_pool, dm, dp, grid=(7, 0)):
    """m, p, mask, du, dshift of the device, on the CPU, strides kept."""
    with device.run(*grid):
        m, p, mask = device.tap(device.there(u), device.there(shift), max_pool, True)
        du, dshift = device.tap_backward(device.there(dm), device.there(dp), mask, device.there(u), max_pool, is_nhwc(u), True)
    return [t.cpu() for t in (m, p, mask, du, dshift)]


def check(device, case, grid=(7, 0), use=("dm", "dp")):
    u, shift = tap_inputs(case)
    dm, dp = upstreams(u, case.max_pool)
    dm, dp = dm if "dm" in use else None, dp if "dp" in use else None
    m, p, mask, du, dshift = tapped(device, u, shift, case.max_pool, dm, dp, grid)
    m_cpu, _, mask_cpu = cpu_tap(u, shift, case.max_pool, True)
    du_cpu, _ = cpu_tap_backward(dm, dp, mask_cpu, u, case.max_pool, is_nhwc(u), True)

    assert_same_bits("m", m, m_cpu)
    assert_same_bits("mask", mask, mask_cpu)
    assert_same_bits("du", du, du_cpu)
    assert (m.stride(), du.stride()) == (m_cpu.stride(), du_cpu.stride())
    v, m_of_pytorch = composed_tap(u, shift, case.max_pool)
    mean = v.double().mean((2, 3))
    assert_close("p", p, mean, magnitude=mean)
    if m_of_pytorch is not None:
        assert_same_bits("m of PyTorch's composition on the CPU", m, m_of_pytorch)

    # What the mask says, in fp64: as du but for its rounding
    wide = u.double().contiguous(memory_format=torch.channels_last if is_nhwc(u) else torch.contiguous_format)
    wide = wide if is_nhwc(wide) == is_nhwc(u) else in_layout(wide, "channels_last")
    exact = [
        cpu_tap_backward(*(None if g is None else f(g.double()) for g in (dm, dp)), mask_cpu, wide, case.max_pool, is_nhwc(u), True)[1]
        for f in (lambda g: g, torch.abs)
    ]
    assert_close("dshift", dshift, exact[0], magnitude=exact[1])


def assert_all_same(what, actual, expected):
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        assert_same_bits(f"{name} {what}", a, e)


# --- values -------------------------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_shifts(device, dtype, layout, max_pool):
    for shape, shift, special in itertools.product(((2, 19, 9, 13), (2, 16, 6, 16)), ("none", "own", "fp32", "strided"), (False, True)):
        check(device, TapCase(shape, dtype, layout, max_pool, shift, special))


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(device, dtype, layout, max_pool):
    for height, width in itertools.product(range(1, 10), range(1, 10)):
        check(device, TapCase((2, 8 if (height + width) % 2 else 5, height, width), dtype, layout, max_pool, special=True))
    for channels in range(1, 34):
        check(device, TapCase((2, channels, 3, 4), dtype, layout, max_pool, special=True))


# Several slabs and several parts of a map; several images a unit; rows of sums that meet twice.
LARGER = {
    "channels_last": [(1, 520, 12, 13), (2, 8, 68, 66), (3, 24, 2, 3), (66, 264, 2, 2)],
    "contiguous": [(1, 1, 264, 258), (2, 3, 40, 64), (70, 2, 3, 2), (1, 300, 2, 2), (3, 37, 14, 14), (2, 19, 28, 28), (1, 2, 231, 71)],
    "cropped": [(1, 2, 132, 131)],
}


@FORMS
@pytest.mark.parametrize("layout", list(LARGER))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger(device, dtype, layout, max_pool):
    for shape in LARGER[layout]:
        check(device, TapCase(shape, dtype, layout, max_pool))


@pytest.mark.parametrize("use", [("dm",), ("dp",), ()], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_missing_gradients(device, layout, use):
    for shape, dtype in itertools.product(((2, 19, 9, 13), (2, 16, 6, 16)), DTYPES):
        check(device, TapCase(shape, dtype, layout, special=True), use=use)


@FORMS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_maps_do_not_drift(device, dtype, max_pool):
    for layout in ("contiguous", "channels_last"):
        u = in_layout(torch.full((1, 8, 90, 96), 0.7).to(dtype), layout)
        p = tapped(device, u, None, max_pool, None, torch.ones(1, 8))[1]
        assert_close("p", p, u.double().mean((2, 3)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_images_far_apart(device, layout):
    """Offsets beyond 2^31 elements; nobody touches the memory between."""
    values, shift = tap_inputs(TapCase((2, 16, 6, 8), torch.bfloat16, layout))
    dm, dp = upstreams(values, True)
    expected = tapped(device, values, shift, True, dm, dp)
    memory = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device.name)
    far = lambda t: memory.as_strided(t.shape, (2**31, *t.stride()[1:])).copy_(t)  # noqa: E731
    with device.run(7, 0):
        m, p, mask = device.tap(far(values), device.there(shift), True, True)
        du, dshift = device.tap_backward(far(dm), device.there(dp), mask, device.there(values), True, is_nhwc(values), True)
    assert_all_same("of images far apart", [t.cpu() for t in (m, p, mask, du, dshift)], expected)


# --- bits ---------------------------------------------------------------------------------------------------------------------
CASES = [
    TapCase((3, 40, 14, 16), torch.bfloat16, "channels_last"),
    TapCase((1, 520, 12, 13), torch.bfloat16, "channels_last"),
    TapCase((3, 20, 14, 16), torch.float32, "contiguous"),
    TapCase((1, 2, 264, 258), torch.float32, "contiguous"),
    TapCase((3, 80, 14, 14), torch.bfloat16, "contiguous"),
    TapCase((3, 80, 14, 14), torch.bfloat16, "contiguous", max_pool=False),
    TapCase((3, 40, 7, 9), torch.float32, "channels_last", max_pool=False),
    TapCase((70, 3, 4, 6), torch.float16, "contiguous", max_pool=False),
]


def case_id(case):
    return f"{case.layout}-{'x'.join(map(str, case.shape))}-{'pooled' if case.max_pool else 'mean'}"


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_bits_do_not_depend_on_the_grid(device, case):
    u, shift = tap_inputs(case)
    first, *others = [tapped(device, u, shift, case.max_pool, *upstreams(u, case.max_pool), grid) for grid in device.grids]
    for grid, other in zip(device.grids[1:], others, strict=True):
        assert_all_same(f"with {grid} blocks and seed", other, first)


@pytest.mark.parametrize("case", [c for c in CASES if c.shape[0] > 1], ids=case_id)
def test_an_image_does_not_depend_on_its_batch(device, case):
    u, shift = tap_inputs(case)
    dm, dp = upstreams(u, case.max_pool)
    m, p, _, du, _ = tapped(device, u, shift, case.max_pool, dm, dp)
    for chosen in ([0], [2, 0], [2, 1, 1, 0, 2]):
        part = in_layout(u[chosen], case.layout)
        m2, p2, _, du2, _ = tapped(device, part, shift, case.max_pool, dm[chosen] if case.max_pool else None, dp[chosen])
        for name, a, e in (("p", p2, p[chosen]), ("du", du2, du[chosen]), *([("m", m2, m[chosen])] if case.max_pool else [])):
            assert_same_bits(f"{name} of images {chosen}", a, e)


def displaced(t, by):
    """The same values and strides, `by` elements behind an aligned address."""
    if t is None:
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return torch.empty(extent + by, dtype=t.dtype).as_strided(t.shape, t.stride(), by).copy_(t)


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_addresses(device, dtype, layout, max_pool):
    for shape in ((2, 16, 6, 16), (2, 16, 6, 14)):
        bits_do_not_depend_on_addresses(device, TapCase(shape, dtype, layout, max_pool, shift="own"))


def bits_do_not_depend_on_addresses(device, case):
    layout, max_pool = case.layout, case.max_pool
    u, shift = tap_inputs(case)
    dm, dp = upstreams(u, max_pool)
    dm = in_layout(dm, layout) if max_pool else None
    expected = tapped(device, u, shift, max_pool, dm, dp)
    for by in (1, 2, 4):
        assert_all_same(
            f"displaced by {by}", tapped(device, *(displaced(t, by) for t in (u, shift)), max_pool, *(displaced(t, by) for t in (dm, dp))), expected
        )
        mask = device.there(displaced(expected[2], by))
        with device.run(7, 0):
            du, dshift = device.tap_backward(device.there(dm), device.there(dp), mask, device.there(u), max_pool, is_nhwc(u), True)
        assert_all_same(f"with a mask displaced by {by}", [*expected[:3], du.cpu(), dshift.cpu()], expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_upstream_gradients_do_not_matter(device, dtype, layout):
    for shape in ((2, 16, 8, 16), (2, 19, 9, 13)):
        u, shift = tap_inputs(TapCase(shape, dtype, layout))
        dm, dp = upstreams(u, True)
        expected = tapped(device, u, shift, True, dm, dp)
        for other in [*(in_layout(dm, name) for name in LAYOUTS if name != "expanded"), dm.transpose(2, 3).contiguous().transpose(2, 3)]:
            assert_all_same(f"of dm with strides {other.stride()}", tapped(device, u, shift, True, other, dp.t().contiguous().t()), expected)
        for one in (dm[:1, :1, :1, :1], dm[:, :, :1, :1], dm[:1]):  # stride 0, as a sum or a mean gives
            each, p = one.expand_as(dm), dp[:1, :1].expand_as(dp)
            assert_all_same(
                f"of dm with strides {each.stride()}",
                tapped(device, u, shift, True, each, p),
                tapped(device, u, shift, True, each.contiguous(), p.contiguous()),
            )


# --- what comes back ------------------------------------------------------------------------------------------------------------
@FORMS
def test_only_what_is_needed(device, max_pool):
    for case in (TapCase(max_pool=max_pool), TapCase((2, 16, 6, 16), torch.bfloat16, "channels_last", max_pool)):
        u, shift = tap_inputs(case)
        dm, dp = upstreams(u, max_pool)
        m, p, mask, du, _ = tapped(device, u, shift, max_pool, dm, dp)
        with device.run(7, 0):
            alone = device.tap(device.there(u), device.there(shift), max_pool, False)
            du2, dshift = device.tap_backward(device.there(dm), device.there(dp), device.there(mask), device.there(u), max_pool, is_nhwc(u), False)
        assert (alone[2].shape, dshift.shape) == ((0,), (0,))
        for name, a, e in (("m", alone[0], m), ("p", alone[1], p), ("du", du2, du)):
            assert_same_bits(name, a.cpu(), e)


@FORMS
def test_nothing_to_do(device, max_pool):
    for shape in ((0, 3, 4, 5), (2, 0, 4, 5)):
        u = torch.empty(shape)
        dm, dp = upstreams(u, max_pool)
        m, p, mask, du, dshift = tapped(device, u, None, max_pool, dm, dp)
        assert (m.numel(), p.shape, mask.numel(), du.shape, dshift.tolist()) == (0, shape[:2], 0, shape, [0.0] * shape[1])


def test_errors(device):
    u, mask, there = device.there(torch.randn(2, 3, 4, 5)), device.there(torch.zeros(2 * 3 * 6, dtype=torch.uint8)), device.there
    for message, call in {
        r"stage_tap: fp64 has no CUDA kernel": lambda: device.tap(u.double(), None, True, True),
        r"stage_tap: u must be \[B, C, H, W\] .* got \[2, 3\]": lambda: device.tap(u[:, :, 0, 0], None, True, True),
        r"stage_tap: shift must be \[3\], got \[4\]": lambda: device.tap(u, there(torch.zeros(4)), True, True),
        r"stage_tap: shift must have the dtype of u": lambda: device.tap(u, there(torch.zeros(3).half()), True, True),
        r"stage_tap_backward: mask must be \[36\], got \[7\]": lambda: device.tap_backward(None, None, mask[:7], u, True, False, True),
        r"stage_tap_backward: dm must be \[2, 3, 2, 2\], got": lambda: device.tap_backward(u, None, mask, u, True, False, True),
        r"stage_tap_backward: dp must have p's dtype": lambda: device.tap_backward(None, u[:, :, 0, 0].half(), mask, u, True, False, True),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call()


def test_without_the_cuda_library_nothing_is_taken_for_it(monkeypatch):
    """The raw operators would be Triton's: the fixture must fail, not test those."""
    monkeypatch.setattr(_backend._native, "cuda_error", "the library is missing")
    with pytest.raises(RuntimeError, match="the CUDA kernels do not run here, so nothing tests them: the library is missing"):
        GpuTap()


# --- mistakes -------------------------------------------------------------------------------------------------------------------
SUMS = "csrc/common/cuda/block_sums.cuh"
ONLY_BF16 = Edit(  # a third of the kernels to compile
    "csrc/stage_tap/cuda/forward.cu",
    "    case DType::F16: return launch_for<__half>(P, stream);\n    default: return launch_for<float>(P, stream);\n",
    "    default: return cudaErrorNotSupported;\n",
)
FORWARD_FILES = ("library.cpp", "common/cuda/host.cpp", "stage_tap/cuda/forward.cpp", "stage_tap/cuda/plan.cpp", "stage_tap/cuda/forward.cu")
FORWARD_SOURCES = cuda_emulation.sources(*FORWARD_FILES)


@pytest.mark.parametrize(
    "edit",
    [
        Edit(SUMS, "  __syncthreads();\n  if (threadIdx.x == 0) {", "  if (threadIdx.x == 0) {"),
        Edit(SUMS, "atomic_add_acq_rel(arrivals, 1)", "atomic_add_relaxed(arrivals, 1)"),
    ],
    ids=["a barrier left out", "a release weakened"],
)
def test_a_mistake_is_caught(edit):
    if reason := cuda_emulation.why_not():
        pytest.skip(reason)
    mutant = cuda_emulation.load(FORWARD_SOURCES, [edit, ONLY_BF16])
    u, shift = tap_inputs(CASES[1])  # its parts meet
    with emulated(mutant, 7, 0), pytest.raises(RuntimeError, match="of output or workspace .* no release and acquire order the two"):
        mutant.ops.stage_tap(u, shift, True, True)
