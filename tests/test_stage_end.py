"""The stage end beside PyTorch's own composition: v and du to the bit, p and the gradients beside fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_end_cases import ACTIVATIONS, DTYPES, NAMES, USES, assert_all_same, check, check_all, is_nhwc, raw_end, raw_end_backward, run, upstreams

from interflow_kernels import StageEnd, backend, stage_end
from interflow_kernels.testing import LAYOUTS, EndCase, assert_close, assert_same_bits, composed_end, end_inputs, in_layout

SHIFTS = ("none", "own", "fp32", "strided")
QUICK = [torch.float32, torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float64, torch.float16))]
pytestmark = pytest.mark.usefixtures("one_thread")  # small maps: the threads of PyTorch's own operators would mostly wait for each other


# --- sizes, dtypes, layouts -----------------------------------------------------------------------------------------------
@ACTIVATIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_dtypes_layouts_shifts(dtype, layout, activation):
    for shift in SHIFTS:
        for special in (False, True):
            for residual in ("none", layout):
                check_all(EndCase(dtype=dtype, layout=layout, activation=activation, shift=shift, residual=residual, special=special))


@pytest.mark.parametrize("residual", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_residual_may_lie_in_memory_as_it_likes(layout, residual):
    for dtype in DTYPES:
        check(EndCase(dtype=dtype, layout=layout, residual=residual, special=True))
    check(EndCase((2, 3, 40, 30), layout=layout, residual=residual))
    check(EndCase((1, 520, 3, 2), layout=layout, residual=residual))


@pytest.mark.parametrize("residual", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_residual_of_another_dtype_is_rounded_to_that_of_u(dtype, residual):
    for layout in ("contiguous", "channels_last"):
        u, shift, r = end_inputs(EndCase(dtype=dtype, layout=layout))
        check(EndCase(), inputs=(u, shift, (r.double() / 3).to(residual)))


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "cropped", "permuted"])
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_every_width(dtype, layout, activation):
    for width in (*range(1, 21), 31, 32, 33, 34, 35, 49):
        for height in (1, 2, 3):
            residual = "none" if width % 3 == 0 else layout
            check(EndCase((2, 2, height, width), dtype, layout, activation, residual=residual, special=True))


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_every_channel_count(dtype, layout, activation):
    for channels in (*range(1, 19), 31, 32, 33):
        for height, width in ((1, 1), (3, 2), (4, 5)):
            residual = "none" if channels % 3 == 0 else layout
            check(EndCase((2, channels, height, width), dtype, layout, activation, residual=residual, special=True))


@pytest.mark.parametrize("dtype", QUICK, ids=str)
def test_large_shapes(dtype):
    for shape, layouts in (
        ((2, 2, 3, 1030), LAYOUTS),  # runs longer than what is gathered at a time
        ((1, 1, 1, 1537), LAYOUTS),
        ((1, 2, 1024, 3), ("cropped", "permuted", "sliced")),
        ((2, 515, 5, 4), LAYOUTS),  # more channels than a slab
        ((1, 1029, 3, 3), ("channels_last", "sliced")),
        ((2, 64, 57, 55), ("channels_last", "sliced")),  # parts that meet in partial sums
        ((1, 4200, 3, 2), ("channels_last",)),
        ((2, 5, 130, 131), ("contiguous", "permuted")),  # a part of one plane
    ):
        for layout in layouts:
            check(EndCase(shape, dtype, layout, residual=layout, special=True))
            check(EndCase(shape, dtype, layout, "none", residual="none"))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", *(pytest.param(each, marks=pytest.mark.slow) for each in LAYOUTS[2:])])
def test_sums_of_large_maps(layout):
    """Random numbers, and one number everywhere: there all roundings of a long sum in fp32 would point the same way."""
    for shape in ((1, 2, 200, 200), (1, 3, 2, 30_000), (1, 64, 112, 112)):
        for dtype in (torch.bfloat16, torch.float32):
            for u in (torch.rand(shape), torch.full(shape, 0.3)):
                check(EndCase(), inputs=(in_layout(u.to(dtype), layout), torch.rand(shape[1]), None))
            dv, dp = torch.full(shape, 0.7, dtype=dtype), torch.full(shape[:2], 0.3)
            dshift = run(in_layout(u.to(dtype), layout), torch.zeros(shape[1]), None, "relu", dv, dp)[3]
            assert_close("dshift", dshift, dp[0].double() + dv[0].double().sum((1, 2)))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 80), st.integers(1, 33), st.integers(1, 33)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    residual=st.sampled_from(("none", *LAYOUTS)),
    activation=st.sampled_from(("relu", "none")),
    shift=st.sampled_from(SHIFTS),
    special=st.booleans(),
    use=st.sampled_from(USES),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, layout, residual, activation, shift, special, use, seed):
    if shape[0] == 0:
        layout, residual = ("contiguous" if each == "expanded" else each for each in (layout, residual))
    case = EndCase(shape, dtype, layout, activation, shift, residual, special)
    check(case, use, end_inputs(case, seed))


@ACTIVATIONS
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (0, 5, 1, 1), (2, 0, 4, 6), (0, 0, 3, 3)], ids=str)
def test_empty(shape, activation):
    for layout in ("contiguous", "channels_last"):
        u, shift, residual = in_layout(torch.randn(shape), layout), torch.randn(shape[1]), torch.randn(shape)
        v, p, du, dshift, dresidual = run(u, shift, residual, activation, *upstreams(shape, u.dtype))
        assert (v.shape, p.shape, du.shape, dshift.shape, dresidual.shape) == (shape, shape[:2], shape, shape[1:2], shape)
        assert not dshift.any()


# --- every number ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_sixteen_bit_number(dtype):
    """Every number beside shifts and residuals that make every kind of rounding: ties, subnormals, overflow to infinity, NaN."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    info = torch.finfo(dtype)
    shift = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.3, 1000.1, 5e-5, -6e-8, 65504.0, 32.0, info.max, -info.max, info.tiny, float("nan"), float("inf")])
    u = numbers.reshape(1, 1, 256, 256).expand(1, len(shift), -1, -1)
    for layout in ("contiguous", "channels_last"):
        for residual in (None, u.flip(1).flip(3), torch.full_like(u, -0.0), torch.full_like(u, 0.7)):
            for activation in ("relu", "none"):
                v, _ = stage_end(in_layout(u, layout), shift, residual, activation=activation)
                assert_same_bits("v", v, composed_end(u, shift, residual, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ACTIVATIONS
def test_special_values_meet(dtype, activation):
    nan, inf, small = float("nan"), float("inf"), torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([nan, -nan, inf, -inf, 0.0, -0.0, small, -small, 1.0, -1.0, 65504.0], dtype=torch.float64).to(dtype)
    u, residual = (t.reshape(1, 1, 11, 11) for t in torch.meshgrid(values, values, indexing="ij"))
    for layout in ("contiguous", "channels_last", "permuted"):
        for shift in (None, torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([-1.0]), torch.tensor([nan]), torch.tensor([-inf])):
            inputs = (in_layout(u.expand(1, 3, 11, 11), layout), None if shift is None else shift.expand(3), residual.expand(1, 3, 11, 11))
            for use in USES:
                check(EndCase(activation=activation), use, inputs)


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_nan_infinity_and_signed_zero_upstream(layout, activation):
    nan, inf = float("nan"), float("inf")
    u = in_layout(torch.randn(2, 9, 7, 8), layout)
    dv, dp = upstreams(tuple(u.shape), u.dtype)
    dp[1, 3], dp[0, 8], dp[0, 0] = nan, inf, -0.0
    dv[0, 2, 1, 1], dv[1, 5, 2, 3], dv[0, 0] = nan, -inf, -0.0
    for use in ((dv, None), (None, dp), (dv, dp)):
        du = run(u, None, None, activation, *use)[2]
        leaf = u.detach().requires_grad_()
        v = composed_end(leaf, None, None, activation)
        pairs = [(out, g) for out, g in ((v, use[0]), (v.mean((2, 3)), use[1])) if g is not None]
        expected = torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])[0]
        assert_same_bits("du", du, expected)


# --- rounding -------------------------------------------------------------------------------------------------------------
def test_shift_is_added_before_the_residual():
    big = 2.0**24
    for layout in ("contiguous", "channels_last"):
        u = in_layout(torch.full((1, 2, 3, 3), 1.0), layout)
        v, p = stage_end(u, torch.full((2,), big), torch.full_like(u, -big))
        assert not v.any() and not p.any()  # 1 + 2^24 rounds to 2^24; the other order would leave the 1
        v, _ = stage_end(torch.full_like(u, big), torch.full((2,), -big), torch.full_like(u, 1.0))
        assert (v == 1).all()


def test_each_step_is_rounded_to_the_dtype_of_u():
    u = torch.ones(1, 2, 2, 2, dtype=torch.bfloat16)
    shift, residual = torch.tensor([1.00390625 + 2**-12] * 2), torch.full_like(u, 2**-8)
    for layout in ("contiguous", "channels_last"):
        v, _ = stage_end(in_layout(u, layout), shift, residual, activation="none")
        assert_same_bits("v", v, u + shift.bfloat16()[:, None, None] + residual)
        assert v.flatten()[0].item() == 2.0  # 1 + bf16(1.0041) = 2.0078 rounds to 2, and 2 + 2^-8 to 2; in one step it would be 2.015625


def test_memory_may_begin_anywhere():
    for dtype in DTYPES:
        for offset in range(1, 9):
            for layout in ("contiguous", "channels_last"):
                u, shift, residual = end_inputs(EndCase((2, 16, 4, 8), dtype, layout))
                moved = []
                for t, by in ((u, offset), (residual, offset % 3)):
                    storage = torch.empty(t.numel() + by, dtype=dtype)
                    moved.append(storage[by:].as_strided(t.shape, t.stride(), by).copy_(t))
                dv, dp = upstreams(tuple(u.shape), dtype)
                apart = torch.empty(dv.numel() + offset, dtype=dtype)[offset:].view(dv.shape).copy_(dv)
                assert_all_same("moved", run(moved[0], shift, moved[1], "relu", apart, dp), run(u, shift, residual, "relu", dv, dp))


# --- strides of what comes back ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_upstream_gradients_do_not_matter(layout, dtype):
    for shape in ((2, 19, 9, 13), (2, 3, 5, 300), (1, 515, 4, 5), (2, 8, 2, 2)):
        inputs = end_inputs(EndCase(shape, dtype, layout))
        dv, dp = upstreams(shape, dtype)
        expected = run(*inputs, "relu", dv, dp)
        strided = [in_layout(dv, other) for other in LAYOUTS if other != "expanded"] + [dv.repeat_interleave(2, 3)[..., ::2], dv.mT.contiguous().mT]
        for each in strided:
            assert_all_same(f"of dv with strides {each.stride()}", run(*inputs, "relu", each, dp.t().contiguous().t()), expected)
        for one in (dv.new_tensor(0.7), dv[:1, :1, :1, :1], dv[:, :, :1, :1], dv[:1, :1], dv[:1]):  # stride 0, as a sum or a mean gives
            each, p = one.expand_as(dv), dp[:1, :1].expand_as(dp)
            assert_all_same(f"of dv with strides {each.stride()}", run(*inputs, "relu", each, p), run(*inputs, "relu", each.contiguous(), p.contiguous()))


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_what_is_needed(layout, activation):
    u, shift, residual = end_inputs(EndCase(layout=layout, activation=activation))
    dv, dp = upstreams(tuple(u.shape), u.dtype)
    whole = run(u, shift, residual, activation, dv, dp)
    for needed in ((True, False, False), (False, True, False), (False, False, True), (False, True, True)):
        leaves = [t.detach().requires_grad_(need) for t, need in zip((u, shift, residual), needed, strict=True)]
        torch.autograd.backward(stage_end(*leaves, activation=activation), (dv, dp))
        for name, leaf, need, expected in zip(NAMES[2:], leaves, needed, whole[2:], strict=True):
            assert (leaf.grad is None) is not need, name
            if need:
                assert_same_bits(name, leaf.grad, expected)
    v = whole[0] if activation == "relu" else None
    for need_shift in (False, True):
        got = raw_end_backward(dv, dp, v, u, is_nhwc(u), need_shift)
        assert_same_bits("du", got[0], whole[2])
        assert got[1].shape == ((19,) if need_shift else (0,))
    assert not any(g.any() for g in raw_end_backward(None, None, v, u, is_nhwc(u), True))


def test_v_of_backward_may_have_any_strides():
    for layout in ("contiguous", "channels_last"):
        u, shift, residual = end_inputs(EndCase(layout=layout))
        dv, dp = upstreams(tuple(u.shape), u.dtype)
        v, _ = raw_end(u, shift, residual, "relu")
        expected = raw_end_backward(dv, dp, v, u, is_nhwc(u), True)
        for other in ("contiguous", "channels_last", "cropped", "sliced", "permuted"):
            for a, b in zip(raw_end_backward(dv, dp, in_layout(v, other), u, is_nhwc(u), True), expected, strict=True):
                assert_same_bits(other, a, b)


# --- module, other backends -----------------------------------------------------------------------------------------------
@ACTIVATIONS
def test_module_and_eager_backend(activation):
    module = StageEnd(activation)
    assert not list(module.parameters()) and not module.state_dict() and repr(module) == f"StageEnd(activation={activation!r})"
    for dtype in DTYPES:
        case = EndCase(dtype=dtype, activation=activation)
        u, shift, residual = end_inputs(case)
        upstream = upstreams(tuple(u.shape), dtype)
        ours = run(u, shift, residual, activation, *upstream, call=lambda *a, activation: module(*a))
        assert_all_same("of the module", ours, run(u, shift, residual, activation, *upstream))
        with backend("eager"):
            theirs = run(u, shift, residual, activation, *upstream)
        assert_same_bits("v", ours[0], theirs[0])
        assert_close("p", ours[1], theirs[1].double(), magnitude=composed_end(u, shift, residual, activation).double().abs().mean((2, 3)))
        if dtype in (torch.float32, torch.float64):
            assert_same_bits("du", ours[2], theirs[2])


def test_without_an_activation_the_map_is_a_copy():
    for name in ("auto", "eager"):
        with backend(name):
            u = torch.randn(1, 2, 3, 3)
            v, _ = stage_end(u, activation="none")
            assert v.data_ptr() != u.data_ptr() and torch.equal(v, u)
