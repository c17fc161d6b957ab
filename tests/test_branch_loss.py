"""The loss of an Interflow head: the aggregate's, and beside it each branch's own."""

import pytest
import torch
import torch.nn.functional as F

from interflow_kernels import FusedInterflowHead, InterflowHead
from interflow_kernels.testing import ATTENTIONS, Counted, HeadCase, assert_close, head_inputs

MAPS = ((4, 6, 5), (8, 3, 3), (5, 2, 2))
TARGET = torch.tensor([0, 4, 2, 2])


def composed(y, z, target, weight, smoothing=0.0):
    return F.cross_entropy(y, target, label_smoothing=smoothing) + weight * sum(
        F.cross_entropy(each, target, label_smoothing=smoothing) for each in z.unbind(1)
    )


@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_loss_and_every_gradient(attention, norm):
    head = FusedInterflowHead([c for c, _, _ in MAPS], 5, attention, norm=norm, branch_loss=0.3)
    exact = InterflowHead(**head._config()).double()
    exact.load_state_dict(head.state_dict())
    maps = head_inputs(HeadCase(batch=4, maps=MAPS))
    found = []
    for module, kind in ((head, torch.float32), (exact, torch.float64)):
        leaves = [x.detach().to(kind).requires_grad_() for x in maps]
        y, z = module.forward_branches(leaves)
        loss = module.loss((y, z), TARGET, 0.1) if module is head else composed(y, z, TARGET, 0.3, 0.1)
        found.append({"loss": loss.detach(), **{f"features[{i}]": g for i, g in enumerate(torch.autograd.grad(loss, leaves, retain_graph=True))}})
        found[-1] |= dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True))
    for name, want in found[1].items():
        assert_close(name, found[0][name], want, 1e-5)


def test_it_takes_one_launch_forward_and_one_backward():
    head = FusedInterflowHead([c for c, _, _ in MAPS], 5, branch_loss=0.3)
    leaves = [x.requires_grad_() for x in head_inputs(HeadCase(batch=4, maps=MAPS))]
    with Counted() as counted:
        head.loss(head.forward_branches(leaves), TARGET).backward()
    ours = [str(op) for op in counted.operators if "interflow_kernels" in str(op)]
    assert ours == ["interflow_kernels.interflow_head.default", "interflow_kernels.interflow_head_backward.default"]


def test_the_aggregate_stays_the_output():
    head = FusedInterflowHead((4,), 5, branch_loss=0.3).train()
    x = [torch.randn(2, 4, 3, 3)]
    assert head(x).shape == (2, 5)
    assert torch.equal(head(x), head.forward_branches(x)[0])


def test_probabilities_and_no_branch_loss():
    y, z = torch.randn(4, 5), torch.randn(4, 3, 5)
    target = torch.randn(4, 5).softmax(1)
    head = InterflowHead([c for c, _, _ in MAPS], 5, branch_loss=0.5)
    assert_close("probabilities", head.loss((y, z), target), composed(y, z, target, 0.5))
    plain = InterflowHead([c for c, _, _ in MAPS], 5)
    assert torch.equal(plain.loss(y, TARGET), F.cross_entropy(y, TARGET))
    assert torch.equal(plain.loss((y, z), TARGET), F.cross_entropy(y, TARGET))


@pytest.mark.parametrize(
    ("output", "target", "sentence"),
    [
        (torch.randn(4, 5), TARGET, r"^output must be y and Z, as forward_branches gives them, for branch_loss=0.3, got y alone$"),
        (torch.randn(4, 3, 5), TARGET, r"^output must be y \[B, K\] with K = 5, or y and Z"),
        ((torch.randn(4, 5),), TARGET, r"^output must be y \[B, K\], or y and Z .* got 1 values$"),
        ((torch.randn(4, 5), torch.randn(4, 2, 5)), TARGET, r"^branches must be \[B, n, K\] with n = 3 and K = 5"),
        ((torch.randn(4, 5), torch.randn(4, 3, 5)), TARGET[:3], r"^target must be \[4\] of class numbers"),
        (("y", torch.randn(4, 3, 5)), TARGET, r"^output must be a tensor, got str$"),
    ],
)
def test_refusals(output, target, sentence):
    head = InterflowHead([c for c, _, _ in MAPS], 5, branch_loss=0.3)
    with pytest.raises((ValueError, TypeError), match=sentence):
        head.loss(output, target)


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), "x", None, True])
def test_another_weight(weight):
    with pytest.raises((ValueError, TypeError), match=r"^branch_loss must be a finite number of at least 0, got "):
        InterflowHead((4,), 5, branch_loss=weight)
