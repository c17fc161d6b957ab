"""The gradient that the fused head gives a map: a view of stride 0, what PyTorch refuses to do with it, and the ways round."""

import pytest
import torch
from torch import Tensor, nn

from interflow_kernels import FusedInterflowHead

LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])


def backward(layout: torch.memory_format, *hooks) -> tuple[Tensor, Tensor]:
    """The gradient behind the hooks of a map, and the eager head's without hooks."""
    torch.manual_seed(0)
    head = FusedInterflowHead((3, 5), 4)
    x, other = (torch.randn(2, c, 4, 4).contiguous(memory_format=layout).requires_grad_() for c in (3, 5))
    (want,) = torch.autograd.grad(head.to_eager()([x, other]).square().sum(), [x])
    feature = x * 1
    for hook in hooks:
        feature.register_hook(hook)
    head([feature, other]).square().sum().backward()
    assert x.grad is not None
    return x.grad, want


@LAYOUTS
def test_hooks_see_a_view_and_a_leaf_gets_a_dense_gradient(layout):
    seen = []
    got, want = backward(layout, lambda g: seen.append(g))
    assert seen[0].stride()[2:] == (0, 0)
    torch.testing.assert_close(seen[0], want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert got.is_contiguous(memory_format=layout)


CHANGES = {"mul_": lambda g: g.mul_(2), "clamp_": lambda g: g.clamp_(-1, 1), "indices": lambda g: g.__setitem__(0, 0.0)}


@pytest.mark.parametrize("change", CHANGES)
@LAYOUTS
def test_changes_in_place(layout, change):
    """Refused; a new tensor, or a dense gradient first, is the way round."""
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory location"):
        backward(layout, CHANGES[change])
    _, want = backward(layout)
    CHANGES[change](want)
    got, _ = backward(layout, lambda g: g.contiguous(), CHANGES[change])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    if change == "mul_":
        torch.testing.assert_close(backward(layout, lambda g: g * 2)[0], want, rtol=1e-5, atol=1e-6)


@LAYOUTS
def test_flat_views(layout):
    """Refused; reshape is the way round, and so is a dense gradient first."""
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        backward(layout, lambda g: g.view(-1).view(g.shape))
    flat = []
    _, want = backward(layout, lambda g: flat.append(g.reshape(-1)))
    backward(layout, lambda g: g.contiguous(), lambda g: flat.append(g.view(-1)))
    for got in flat:
        torch.testing.assert_close(got, want.reshape(-1), rtol=1e-5, atol=1e-6)


def test_other_pool_sizes_give_dense_gradients():
    head, x, strides = FusedInterflowHead((3,), 4, pool_size=2), torch.randn(2, 3, 4, 4, requires_grad=True), []
    feature = x * 1
    feature.register_hook(lambda g: strides.append(g.stride()) or g.mul_(2))
    head([feature]).sum().backward()
    assert strides == [(48, 16, 4, 1)]


def test_backward_hooks_of_the_module_before():
    layer, head = nn.Conv2d(3, 3, 1), FusedInterflowHead((3,), 4)
    strides = []
    layer.register_full_backward_hook(lambda module, inputs, outputs: strides.append(outputs[0].stride()))
    head([layer(torch.randn(2, 3, 4, 4, requires_grad=True))]).sum().backward()
    assert strides[0][2:] == (0, 0)
