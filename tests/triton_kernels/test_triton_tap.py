"""The tap's Triton kernels: m, mask and the choice of the gradient to the bit, p and gradients beside fp64."""

import os
import warnings

import pytest
import torch
import torch.nn.functional as F
from example_count import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from interflow_kernels import reference, stage_tap
from interflow_kernels._tap_format import is_channels_last as is_nhwc
from interflow_kernels.testing import (
    LAYOUTS,
    TapCase,
    assert_close,
    assert_same_bits,
    composed_tap,
    composed_tap_gradient,
    in_layout,
    tap_inputs,
)

raw_tap = torch.ops.interflow_kernels.stage_tap.default
raw_tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # hypothesis mixes badly with the fixture of this name
EXAMPLES = examples(300 if DEVICE == "cuda" else 25)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


def mask_of_the_contract(u, shift, max_pool, nhwc):
    """The bytes that csrc/stage_tap/contract.h describes; u and shift on the CPU. nhwc: whether u has that layout on its device."""
    v, m = composed_tap(u, shift)
    passes = ~(v <= 0)
    if not max_pool:
        runs = passes.permute(0, 2, 3, 1) if nhwc else passes.flatten(2)
        eights = F.pad(runs, (0, -runs.shape[-1] % 8)).unflatten(-1, (-1, 8))
        return (eights << torch.arange(8)).sum(-1).to(torch.uint8).flatten()
    (height, width), (complete_h, complete_w) = u.shape[2:], m.shape[2:]
    windows = F.pad(passes, (0, width % 2, 0, height % 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
    maximum = torch.zeros_like(windows)
    if m.numel():
        at = F.max_pool2d(v, 2, 2, return_indices=True)[1]
        maximum[:, :, :complete_h, :complete_w] = F.one_hot(at // width % 2 * 2 + at % width % 2, 4).bool()
    found = ((windows.int() + 16 * (maximum & windows)) << torch.arange(4)).sum(-1).to(torch.uint8)
    return (found.permute(0, 2, 3, 1) if nhwc else found).flatten()


def upstreams(shape, dtype, max_pool, seed=3):
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    dm = torch.randn(batch, channels, height // 2, width // 2, generator=generator).to(dtype) if max_pool else None
    return dm, torch.randn(batch, channels, generator=generator)


def run(u, shift, max_pool, dm, dp):
    """m, p, du, dshift of the tap; gradients None where there are none."""
    leaves = [u.detach().requires_grad_(), None if shift is None else shift.detach().requires_grad_()]
    m, p = stage_tap(*leaves, max_pool=max_pool)
    pairs = [(out, g) for out, g in ((m, dm), (p, dp)) if g is not None]
    grads = torch.autograd.grad([o for o, _ in pairs], [t for t in leaves if t is not None], [g for _, g in pairs])
    return None if m is None else m.detach(), p.detach(), grads[0], grads[1] if shift is not None else None


def check(case, device, use=("dm", "dp"), seed=0):
    u, shift = tap_inputs(case, seed)
    u = in_layout(u.to(device), case.layout)
    shift = None if shift is None else shift.to(device)
    dm, dp = (None if g is None else g.to(device) for g in upstreams(tuple(u.shape), u.dtype, case.max_pool))
    dm, dp = dm if "dm" in use else None, dp if "dp" in use or dm is None else None
    nhwc = is_nhwc(u)
    found = run(u, shift, case.max_pool, dm, dp)
    mask = raw_tap(u, shift, case.max_pool, True)[2].cpu()
    m, p, du, dshift = (None if t is None else t.cpu() for t in found)
    strides = None if found[0] is None else found[0].stride()
    u, shift, dm, dp = (None if t is None else t.cpu() for t in (u, shift, dm, dp))  # PyTorch's operators on another device may have other bits

    # To the bit: m, its strides, the mask
    v, expected = composed_tap(u, shift, case.max_pool)
    if case.max_pool:
        assert_same_bits("m", m, expected)
        like = torch.empty_like(expected, memory_format=torch.channels_last if nhwc else torch.contiguous_format)
        assert not m.numel() or min(m.shape) == 1 or strides == like.stride()
    assert torch.equal(mask, mask_of_the_contract(u, shift, case.max_pool, nhwc))

    # Beside fp64: p, du, d(shift)
    mean = v.double().mean((2, 3))
    assert_close("p", p, mean, magnitude=mean)
    leaf = (u if shift is None else u + shift.to(u.dtype)[:, None, None]).double().detach()

    def exact(upstream):
        x = leaf.clone().requires_grad_()
        outputs = reference.stage_tap(x, None, case.max_pool)
        pairs = [(out, g.double()) for out, g in zip(outputs, upstream, strict=True) if g is not None]
        return torch.autograd.grad([o for o, _ in pairs], x, [g for _, g in pairs])[0]

    wanted, magnitude = exact((dm, dp)), exact([None if g is None else g.abs() for g in (dm, dp)])
    assert_close("du", du, wanted, magnitude=magnitude)
    if shift is not None:
        assert_close("dshift", dshift, wanted.sum((0, 2, 3)), magnitude=magnitude.sum((0, 2, 3)))

    # To the bit: du of one upstream gradient alone, in PyTorch's own dtype
    if len(use) == 1 and u.numel():
        assert_same_bits("du", du, composed_tap_gradient(u, shift, case.max_pool, dm, dp))


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_shifts(dtype, layout, max_pool, device):
    for shift, use in (("none", ("dm",)), ("own", ("dp",)), ("strided", ("dm", "dp"))):
        check(TapCase((2, 11, 5, 7), dtype, layout, max_pool, shift, special=True), device, use)
    check(TapCase((2, 11, 5, 7), dtype, layout, max_pool), device)


@FORMS
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 9, 61, 90), "channels_last"),  # parts: the last to arrive adds them
        ((1, 70, 6, 4), "channels_last"),
        ((2, 9, 1, 5), "channels_last"),
        ((1, 3, 50, 48), "contiguous"),  # more than a tile
        ((1, 3, 47, 49), "cropped"),
        ((2, 2, 1, 1), "contiguous"),
        ((1, 5, 8, 1), "permuted"),
        ((1, 70, 2, 3), "contiguous"),
    ],
    ids=str,
)
def test_shapes(shape, layout, max_pool, device):
    for special in (True, False):  # special values leave few finite sums
        check(TapCase(shape, torch.bfloat16, layout, max_pool, special=special), device)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 20)),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    max_pool=st.booleans(),
    shift=st.sampled_from(["none", "own", "fp32", "strided"]),
    special=st.booleans(),
    use=st.sampled_from([("dm",), ("dp",), ("dm", "dp")]),
    seed=st.integers(0, 99),
)
def test_any_shape(shape, dtype, layout, max_pool, shift, special, use, seed):
    layout = "contiguous" if shape[0] == 0 else layout
    check(TapCase(shape, dtype, layout, max_pool, shift, special), DEVICE, use, seed)


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_long_sums_of_one_number(layout, max_pool, device):
    """There all roundings of a long sum in fp32 would point the same way."""
    shape = (1, 8, 96, 100)
    u, shift = in_layout(torch.full(shape, 0.3, device=device), layout), torch.zeros(8, device=device)
    dm = torch.full((1, 8, 48, 50), 0.7, device=device) if max_pool else None
    dp = torch.full((1, 8), 0.3, device=device)
    _, p, _, dshift = run(u, shift, max_pool, dm, dp)
    assert_close("p", p, torch.full((1, 8), float(u[0, 0, 0, 0]), dtype=torch.float64, device=device))
    assert_close("dshift", dshift, dp[0].double() + (dm[0].double().sum((1, 2)) if max_pool else 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_of_upstream_gradients_do_not_matter(layout, dtype, device):
    shape = (2, 19, 5, 6)
    u, shift = tap_inputs(TapCase(shape, dtype))
    u, shift = in_layout(u.to(device), layout), shift.to(device)
    dm, dp = (g.to(device) for g in upstreams(shape, dtype, True))
    expected = run(u, shift, True, dm, dp)
    for each in (
        in_layout(dm, "channels_last"),
        in_layout(dm, "permuted"),
        dm.repeat_interleave(2, 3)[..., ::2],
        dm.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        for name, a, b in zip(("du", "dshift"), run(u, shift, True, each, dp.t().contiguous().t())[2:], expected[2:], strict=True):
            assert_same_bits(f"{name} of dm with strides {each.stride()}", a, b)
    for one in (dm.new_tensor(0.7), dm[:, :, :1, :1], dm[:1]):
        each, p = one.expand_as(dm), dp[:1, :1].expand_as(dp)
        for a, b in zip(run(u, shift, True, each, p)[2:], run(u, shift, True, each.contiguous(), p.contiguous())[2:], strict=True):
            assert_same_bits("stride 0", a, b)


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_an_image_does_not_depend_on_its_batch(layout, max_pool, device):
    u, shift = torch.randn(5, 40, 13, 12).to(device, torch.bfloat16), torch.randn(40, device=device)
    dm, dp = (None if g is None else g.to(device) for g in upstreams(tuple(u.shape), u.dtype, max_pool))

    def part(chosen):
        return run(in_layout(u[chosen], layout), shift, max_pool, dm[chosen] if max_pool else None, dp[chosen])[:3]

    whole = part(torch.arange(5))
    for chosen in ([0], [4], [3, 4, 0]):
        for a, b in zip(whole, part(torch.tensor(chosen)), strict=True):
            assert (a is None and b is None) or torch.equal(a[chosen], b)


def test_either_gradient_and_the_mask_may_be_missing(device):
    u, shift = (t.to(device) for t in tap_inputs(TapCase()))
    m, p, mask = raw_tap(u, shift, True, False)
    assert mask.shape == (0,)
    assert torch.equal(m, raw_tap(u, shift, True, True)[0])
    mask = raw_tap(u, shift, True, True)[2]
    du, dshift = raw_tap_backward(None, None, mask, u, True, False, True)
    assert not du.any() and not dshift.any()
    assert raw_tap_backward(None, p, mask, u, True, False, False)[1].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((torch.zeros(2, 3, 4), None), r"u must be \[B, C, H, W\]"),
        ((torch.zeros(2, 3, 0, 4), None), "H and W of at least 1"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(4)), r"shift must be \[3\]"),
        ((torch.zeros(2, 3, 4, 4), torch.zeros(3).half()), "shift must have the dtype of u"),
        ((torch.zeros(2, 3, 4, 4).double(), None), "in fp32, bf16 or fp16, got torch.float64; backend"),
    ],
    ids=str,
)
def test_errors_of_raw_calls(arguments, sentence, device):
    u, shift = (None if t is None else t.to(device) for t in arguments)
    with pytest.raises(RuntimeError, match=sentence):
        raw_tap(u, shift, True, True)


def test_errors_of_raw_backward_calls(device):
    u = torch.zeros(2, 3, 4, 4, device=device)
    _, p, mask = raw_tap(u, None, True, True)
    for arguments, sentence in (
        ((None, p, mask[:-1], u), "mask must be 24 contiguous bytes"),
        ((None, p.double(), mask, u), r"dp must be \[2, 3\] in fp32"),
        ((u, p, mask, u), r"dm must be \[2, 3, 2, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=sentence):
            raw_tap_backward(*arguments, True, False, True)
