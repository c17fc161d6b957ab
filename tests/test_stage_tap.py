"""The stage tap beside PyTorch's own composition: m and the choice of the gradient to the bit, p and gradients beside fp64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_tap_cases import DTYPES, FORMS, check, check_choice, composed, is_nhwc, raw_tap, raw_tap_backward, run, upstreams

from interflow_kernels import reference, stage_tap
from interflow_kernels.testing import LAYOUTS, TapCase, assert_close, assert_same_bits, in_layout, tap_inputs

SHIFTS = ("none", "own", "fp32", "strided")
pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: the threads of PyTorch's own operators would mostly wait for each other


# --- sizes, dtypes, layouts -----------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_shifts(dtype, layout, max_pool):
    for shift in SHIFTS:
        for special in (False, True):
            case = TapCase(dtype=dtype, layout=layout, max_pool=max_pool, shift=shift, special=special)
            check(case)
            check_choice(*tap_inputs(case), max_pool)


@pytest.mark.parametrize("use", [("dm",), ("dp",)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_gradient_may_be_missing(dtype, layout, use):
    check(TapCase(dtype=dtype, layout=layout, special=True), use=use)
    check(TapCase((1, 5, 4, 33), dtype, layout, special=True), use=use)


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(dtype, layout, max_pool):
    for width in (*range(1, 21), 31, 32, 33, 34, 35):
        for height in (1, 2, 3):
            inputs = tap_inputs(TapCase((2, 2, height, width), dtype, layout, max_pool, special=True), width)
            check(TapCase(max_pool=max_pool), inputs=inputs)
            check_choice(*inputs, max_pool)


@FORMS
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_channel_count(dtype, layout, max_pool):
    for channels in (*range(1, 19), 31, 32, 33):
        for height, width in ((1, 1), (3, 2), (4, 5)):
            inputs = tap_inputs(TapCase((2, channels, height, width), dtype, layout, max_pool, special=True), channels)
            check(TapCase(max_pool=max_pool), inputs=inputs)
            check_choice(*inputs, max_pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_shapes(dtype):
    for shape, layouts in (
        ((2, 2, 3, 1030), LAYOUTS),  # rows longer than what is gathered at a time, in windows and in a run
        ((1, 1, 1, 1537), LAYOUTS),
        ((1, 3, 2, 513), LAYOUTS),
        ((1, 2, 1024, 3), ("cropped", "permuted", "sliced")),
        ((2, 515, 5, 4), LAYOUTS),  # more channels than a slab
        ((1, 1029, 3, 3), ("channels_last", "sliced")),
        ((2, 64, 57, 55), ("channels_last", "sliced")),  # parts that meet in partial sums
        ((1, 4200, 3, 2), ("channels_last",)),  # one window or pixel a part
        ((2, 5, 130, 131), ("contiguous", "permuted")),  # a part of one plane
    ):
        for layout in layouts:
            for max_pool in (True, False):
                check(TapCase(shape, dtype, layout, max_pool, special=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_of_large_maps(layout):
    """Random numbers, and one number everywhere: there all roundings of a long sum in fp32 would point the same way."""
    for shape in ((1, 2, 200, 200), (1, 1, 300, 301), (1, 3, 2, 30_000), (1, 64, 112, 112)):
        for dtype in (torch.bfloat16, torch.float32):
            for max_pool in (True, False):
                for u in (torch.rand(shape), torch.full(shape, 0.3)):
                    check(TapCase(max_pool=max_pool), inputs=(in_layout(u.to(dtype), layout), torch.rand(shape[1])))
                dm = torch.full((*shape[:2], shape[2] // 2, shape[3] // 2), 0.7, dtype=dtype) if max_pool else None
                dp = torch.full(shape[:2], 0.3)
                dshift = run(in_layout(u.to(dtype), layout), torch.zeros(shape[1]), max_pool, dm, dp)[3]
                assert_close("dshift", dshift, dp[0].double() + (dm[0].double().sum((1, 2)) if max_pool else 0))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 80), st.integers(1, 33), st.integers(1, 33)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    max_pool=st.booleans(),
    shift=st.sampled_from(SHIFTS),
    special=st.booleans(),
    use=st.sampled_from([("dm",), ("dp",), ("dm", "dp")]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, layout, max_pool, shift, special, use, seed):
    if shape[0] == 0:
        layout = "contiguous" if layout == "expanded" else layout
    case = TapCase(shape, dtype, layout, max_pool, shift, special)
    inputs = tap_inputs(case, seed)
    check(case, use, inputs)
    check_choice(*inputs, max_pool)


@FORMS
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (0, 5, 1, 1), (2, 0, 4, 6), (0, 0, 3, 3)], ids=str)
def test_empty(shape, max_pool):
    for layout in ("contiguous", "channels_last"):
        u, shift = in_layout(torch.randn(shape), layout), torch.randn(shape[1])
        dm, dp = upstreams(TapCase(shape, max_pool=max_pool), u.dtype)
        m, p, du, dshift = run(u, shift, max_pool, dm, dp)
        assert (m is None) is not max_pool
        assert m is None or m.shape == (*shape[:2], shape[2] // 2, shape[3] // 2)
        assert (p.shape, du.shape, dshift.shape) == (shape[:2], shape, shape[1:2])
        assert not dshift.any()


# --- every window, every sum ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_window_of_special_values(dtype):
    nan, inf, small = float("nan"), float("inf"), torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, small, -small, 1.0, 2.0, -1.0], dtype=torch.float64)
    values = torch.cat([values.to(dtype), values[:1].to(dtype)])
    words = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])
    words[-1] |= torch.iinfo(words.dtype).min  # a negative NaN, which a conversion between dtypes would lose
    windows = torch.cartesian_prod(*[values] * 4).reshape(-1, 2, 2)  # 11^4
    row = windows.permute(1, 0, 2).reshape(1, 1, 2, -1)
    for shift in (None, torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([-1.0]), torch.tensor([nan]), torch.tensor([-inf])):
        check_choice(row, shift)
        check_choice(in_layout(row, "permuted"), shift)
    for layout in ("contiguous", "channels_last"):
        check_choice(in_layout(windows[None], layout))
        check_choice(in_layout(windows[None], layout), max_pool=False)
        odd = F.pad(windows[None], (0, 1, 0, 1), value=3.0)  # each window with all its incomplete neighbours
        odd[:, :, 2, :2], odd[:, :, :2, 2], odd[:, :, 2, 2] = windows[:, 0], windows[:, :, 1], windows[:, 1, 0]
        check_choice(in_layout(odd, layout))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_sixteen_bit_number(dtype):
    """Every number beside shifts that make every kind of rounding: ties, subnormals, overflow to infinity, NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    info = torch.finfo(dtype)
    shift = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, 0.3, 1000.1, 5e-5, -6e-8, 65504.0, 32.0, info.max, -info.max, info.tiny, -info.tiny / 2, float("nan"), float("inf")]
    )
    u = numbers.reshape(1, 1, 256, 256).repeat_interleave(2, 2).repeat_interleave(2, 3).expand(1, len(shift), -1, -1)
    for layout in ("contiguous", "channels_last"):
        for s in (shift, None):
            m, _ = stage_tap(in_layout(u, layout), s)
            assert_same_bits("m", m, composed(u, s)[1])


def test_shift_is_rounded_before_it_is_added():
    u, shift = torch.tensor([1.0, 2.0]).bfloat16().reshape(1, 2, 1, 1).expand(1, 2, 2, 2), torch.tensor([1.00390625 + 2**-12, -1.9999])
    for layout in ("contiguous", "channels_last"):
        m, p = stage_tap(in_layout(u, layout), shift)
        assert m.flatten().tolist() == [2.0, 0.0]  # 1 + bf16(1.0041) = 2.0078 rounds to even; unrounded it would be 2.015625
        assert p.flatten().tolist() == m.flatten().tolist()


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_nan_and_infinity_upstream_stay_where_they_belong(layout, max_pool):
    u = in_layout(torch.randn(2, 9, 7, 8), layout)
    dm, dp = upstreams(TapCase(tuple(u.shape), max_pool=max_pool), u.dtype)
    dp[1, 3], dp[0, 8] = float("nan"), float("inf")
    if max_pool:
        dm[0, 2, 1, 1], dm[1, 5, 2, 3] = float("nan"), -float("inf")
    _, _, du, _ = run(u, None, max_pool, dm, dp)
    leaf = u.detach().requires_grad_()
    m, p = reference.stage_tap(leaf, None, max_pool)
    expected = torch.autograd.grad([m, p] if max_pool else [p], leaf, [dm, dp] if max_pool else [dp])[0]
    assert_same_bits("du", du, expected)
    assert du.isnan().any() and du[0, :2].isfinite().all()


def mask_of_the_contract(u, shift, max_pool):
    """The bytes that csrc/stage_tap/contract.h describes."""
    v, m = composed(u, shift)
    passes = ~(v <= 0)
    if not max_pool:
        runs = passes.permute(0, 2, 3, 1) if is_nhwc(u) else passes.flatten(2)
        eights = F.pad(runs, (0, -runs.shape[-1] % 8)).unflatten(-1, (-1, 8))
        return (eights << torch.arange(8)).sum(-1).to(torch.uint8).flatten()
    (height, width), (complete_h, complete_w) = u.shape[2:], m.shape[2:]
    windows = F.pad(passes, (0, width % 2, 0, height % 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)  # [..., 4]
    maximum = torch.zeros_like(windows)
    if m.numel():
        at = F.max_pool2d(v, 2, 2, return_indices=True)[1]
        maximum[:, :, :complete_h, :complete_w] = F.one_hot(at // width % 2 * 2 + at % width % 2, 4).bool()
    found = ((windows.int() + 16 * (maximum & windows)) << torch.arange(4)).sum(-1).to(torch.uint8)
    return (found.permute(0, 2, 3, 1) if is_nhwc(u) else found).flatten()


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_is_what_the_contract_says(dtype, layout, max_pool):
    for shape in ((2, 19, 9, 13), (1, 3, 4, 38), (1, 515, 2, 3), (2, 9, 1, 5), (2, 8, 6, 1)):
        u, shift = tap_inputs(TapCase(shape, dtype, layout, special=True))
        assert torch.equal(raw_tap(u, shift, max_pool, True)[2], mask_of_the_contract(u, shift, max_pool))


# --- strides of what comes back ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_upstream_gradients_do_not_matter(layout, dtype):
    for shape in ((2, 19, 9, 13), (2, 9, 5, 1100), (1, 515, 4, 5), (2, 8, 2, 2)):
        if shape[3] > 1000 and layout in ("channels_last", "sliced"):
            continue
        case = TapCase(shape, dtype, layout)
        inputs = tap_inputs(case)
        dm, dp = upstreams(case, dtype)
        strided = [in_layout(dm, other) for other in LAYOUTS if other != "expanded"] + [
            dm.repeat_interleave(2, 3)[..., ::2],
            dm.transpose(2, 3).contiguous().transpose(2, 3),
        ]
        expected = run(*inputs, True, dm, dp)
        for each in strided:
            for name, a, b in zip(("du", "dshift"), run(*inputs, True, each, dp.t().contiguous().t())[2:], expected[2:], strict=True):
                assert_same_bits(f"{name} of dm with strides {each.stride()}", a, b)
        for one in (dm.new_tensor(0.7), dm[:1, :1, :1, :1], dm[:, :, :1, :1], dm[:1, :1], dm[:1]):  # stride 0, as a sum or a mean gives
            each, p = one.expand_as(dm), dp[:1, :1].expand_as(dp)
            for name, a, b in zip(("du", "dshift"), run(*inputs, True, each, p)[2:], run(*inputs, True, each.contiguous(), p.contiguous())[2:], strict=True):
                assert_same_bits(f"{name} of dm with strides {each.stride()}", a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_what_is_needed(layout):
    case = TapCase(layout=layout)
    u, shift = tap_inputs(case)
    dm, dp = upstreams(case, u.dtype)
    _, _, du, dshift = run(u, shift, True, dm, dp)
    for need_u, need_shift in ((True, False), (False, True)):
        leaves = u.detach().requires_grad_(need_u), shift.detach().requires_grad_(need_shift)
        torch.autograd.backward(stage_tap(*leaves), (dm, dp))
        assert (leaves[0].grad is None, leaves[1].grad is None) == (not need_u, not need_shift)
        assert torch.equal(leaves[0].grad, du) if need_u else torch.equal(leaves[1].grad, dshift)
    mask = raw_tap(u, shift, True, True)[2]
    for need_shift in (False, True):
        got = raw_tap_backward(dm, dp, mask, u, True, is_nhwc(u), need_shift)
        assert torch.equal(got[0], du)
        assert got[1].shape == ((19,) if need_shift else (0,))
    assert not any(g.any() for g in raw_tap_backward(None, None, mask, u, True, is_nhwc(u), True))
