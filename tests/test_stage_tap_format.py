"""How the stage tap's m and du lie in memory: one rule for kernels, fakes and every stride, PyTorch's own where it gives channels_last."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from stage_tap_cases import raw_tap, raw_tap_backward
from torch._subclasses.fake_tensor import FakeTensorMode

from interflow_kernels import stage_tap
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import assert_same_bits


def strided(sizes, strides):
    """A map [B, C, H, W] with these strides, which may repeat or overlap elements."""
    count = 1 + sum((s - 1) * t for s, t in zip(sizes, strides, strict=True))
    return (torch.arange(count, dtype=torch.float32) % 23 - 7).as_strided(sizes, strides)


def dense(shape, channels_last):
    return torch.empty(shape).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format).stride()


def check(u):
    shift = torch.linspace(-1, 1, u.shape[1])
    m, p, mask = raw_tap(u, shift, True, True)
    du, _ = raw_tap_backward(torch.ones_like(m), torch.ones_like(p), mask, u, True, is_channels_last(u), True)
    with FakeTensorMode() as mode:
        fake_u, fake_shift = mode.from_tensor(u), mode.from_tensor(shift)
        fakes = raw_tap(fake_u, fake_shift, True, True)
        fake_du = raw_tap_backward(torch.ones_like(fakes[0]), torch.ones_like(fakes[1]), fakes[2], fake_u, True, is_channels_last(fake_u), True)[0]
    v = F.relu(u + shift[:, None, None])
    eager = F.max_pool2d(v, 2, 2)
    what = f"sizes {tuple(u.shape)}, strides {u.stride()}"
    last = is_channels_last(u)
    if u.shape[1] > 1:  # else both formats are one
        assert m.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), what
        assert du.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format), what
    assert (m.stride(), du.stride()) == (fakes[0].stride(), fake_du.stride()), what
    assert_same_bits(f"m of {what}", m, eager)
    torch.testing.assert_close(p, v.mean((2, 3)), msg=lambda m: f"p of {what}: {m}")
    leaf = u.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    torch.autograd.backward(stage_tap(leaf, shift), (torch.ones_like(m), torch.ones_like(p)))
    assert_same_bits(f"du of {what}", du, leaf.grad)
    return m, eager


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize("order", list(itertools.permutations("BCHW")), ids="".join)
def test_every_order_of_dimensions_is_what_pytorch_gives(order, gap):
    sizes = dict(B=2, C=6, H=5, W=4)
    strides, step = {}, 1
    for d in reversed(order):
        strides[d], step = step, step * sizes[d] + gap
    m, eager = check(strided([sizes[d] for d in "BCHW"], [strides[d] for d in "BCHW"]))
    assert m.stride() == eager.stride()
    assert (m.stride(1) == 1) == (order == ("B", "H", "W", "C"))


@pytest.mark.parametrize(
    ("sizes", "strides", "channels_last"),
    [
        ((2, 4, 5, 6), (120, 1, 24, 4), True),
        ((2, 4, 5, 6), (0, 1, 24, 4), True),  # an image repeated
        ((1, 4, 5, 6), (0, 1, 24, 4), True),  # one image: its stride does not count
        ((2, 4, 5, 6), (4, 1, 0, 0), False),  # a pixel repeated, as (pooled [B, C])[..., None, None].expand
        ((2, 4, 5, 6), (24, 1, 0, 4), False),  # a row repeated
        ((2, 4, 5, 6), (20, 1, 4, 0), False),  # a column repeated
        ((2, 4, 5, 6), (120, 1, 4, 20), False),  # H and W transposed
        ((2, 4, 5, 6), (4, 1, 48, 8), False),  # images inside rows
        ((2, 4, 5, 6), (30, 1, 6, 1), False),  # channels overlap columns
        ((2, 1, 5, 6), (30, 1, 6, 1), False),  # one channel
    ],
)
def test_repeated_transposed_and_overlapping_pixels(sizes, strides, channels_last):
    u = strided(sizes, strides)
    assert is_channels_last(u) is channels_last
    m, eager = check(u)
    assert m.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    if sizes[1] > 1 and sizes[0] > 1 and strides[1] != strides[3]:  # of equal strides PyTorch lets the sizes decide
        assert m.stride() == eager.stride()


@settings(max_examples=250, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(2, 5), st.integers(2, 5)),
    strides=st.tuples(*[st.sampled_from([0, 1, 1, 2, 3, 4, 5, 9, 12, 20, 45, 60, 225, 500])] * 4),
)
def test_any_strides(sizes, strides):
    """Kernels and fakes agree; where the rule says channels_last, PyTorch does."""
    u = strided(sizes, strides)
    m, eager = check(u)
    if is_channels_last(u) and sizes[0] > 1:
        assert m.stride() == eager.stride(), (sizes, strides)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(sizes=st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(1, 4), st.integers(1, 4)), last=st.booleans(), max_pool=st.booleans())
def test_small_and_empty_maps_agree_with_their_fakes(sizes, last, max_pool):
    u = torch.randn(sizes).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    real = raw_tap(u, None, max_pool, True)
    with FakeTensorMode() as mode:
        fake = raw_tap(mode.from_tensor(u), None, max_pool, True)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride()) == (b.shape, b.stride())
