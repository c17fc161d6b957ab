"""Maps of more than 2^31 elements: both operators, forward and backward, in both layouts. On a CPU the same checks on a few images."""

import pytest
import torch

from interflow_kernels import FusedInterflowHead
from interflow_kernels.testing import assert_same_bits

tap = torch.ops.interflow_kernels.stage_tap.default
tap_backward = torch.ops.interflow_kernels.stage_tap_backward.default
MAP = (128, 112, 112)
ACROSS = 2**31 // (128 * 112 * 112)  # the image that element 2^31 lies in
NEEDED = 24 << 30  # bytes: u, du, m, the mask and what is compared


@pytest.fixture(params=["contiguous", "channels_last"])
def images(request, device, most_of_the_memory):
    """[1400, 128, 112, 112] of zeros, image ACROSS of twos, the last of ones; and the number of ACROSS. On a CPU [4, 128, 8, 8]."""
    batch, shape, across = (1400, MAP, ACROSS) if device.type == "cuda" else (4, (128, 8, 8), 2)
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < NEEDED:
        pytest.skip(f"needs {NEEDED >> 30} GiB of free GPU memory, {torch.cuda.mem_get_info()[0] >> 30} are free")
    dense = torch.contiguous_format if request.param == "contiguous" else torch.channels_last
    u = torch.empty(batch, *shape, device=device, dtype=torch.bfloat16, memory_format=dense).zero_()
    u[across].fill_(2.0)
    u[-1].fill_(1.0)
    assert device.type == "cpu" or u.numel() > 2**31
    return u, across


def by_image(t, across):
    """The value that each of the three kinds of image has throughout: zeros, that of `across`, the last."""
    kept = torch.ones(len(t), dtype=torch.bool, device=t.device)
    kept[across] = kept[-1] = False
    flat = t.reshape(len(t), -1) if t.dim() < 4 else t.amax((1, 2, 3), keepdim=True).flatten(1)
    low = flat if t.dim() < 4 else t.amin((1, 2, 3), keepdim=True).flatten(1)
    assert not flat[kept].any() and not low[kept].any()
    assert flat[across].amin() == flat[across].amax() == low[across].amin() and flat[-1].amin() == flat[-1].amax() == low[-1].amin()
    return float(flat[across].amax()), float(flat[-1].amax())


def test_tap(images):
    u, across = images
    nhwc, pixels = u.stride(1) == 1, u.shape[2] * u.shape[3]
    m, p, mask = tap(u, None, True, True)
    assert by_image(m, across) == by_image(p, across) == (2.0, 1.0)
    del m
    du, dshift = tap_backward(None, torch.full_like(p, pixels), mask, u, True, nhwc, True)
    assert by_image(du, across) == (1.0, 1.0)
    assert dshift.eq(2 * pixels).all()
    del du
    dm = torch.ones(len(u), u.shape[1], u.shape[2] // 2, u.shape[3] // 2, device=u.device, dtype=u.dtype)
    du, dshift = tap_backward(dm, None, mask, u, True, nhwc, True)
    assert dshift.eq(2 * pixels // 4).all()
    assert du[across].sum() == du[-1].sum() == u.shape[1] * pixels // 4 and du[across, :, ::2, ::2].eq(1).all() and not du[0].any()


def test_mean_only(images):
    u, across = images
    _, p, mask = tap(u, None, False, True)
    assert by_image(p, across) == (2.0, 1.0)
    du, _ = tap_backward(None, torch.full_like(p, u.shape[2] * u.shape[3]), mask, u, False, u.stride(1) == 1, True)
    assert by_image(du, across) == (1.0, 1.0)


def test_head(images):
    u, across = images
    head = FusedInterflowHead((128,), 10, device=u.device, dtype=torch.bfloat16)
    leaf = u.requires_grad_()
    y = head([leaf])
    for image in (0, across, -1):
        alone = slice(image, image + 1 or None)
        assert_same_bits(f"y of image {image}", y[alone], head([u[alone]]))
    assert not torch.equal(y[0], y[-1]) and torch.equal(y[0], y[1])
    gradient, weight = torch.autograd.grad(y.float().sum(), [leaf, head.weight])
    assert gradient.stride()[2:] == (0, 0) and torch.equal(gradient[0], gradient[-1])
    assert weight.isfinite().all() and weight.any()
