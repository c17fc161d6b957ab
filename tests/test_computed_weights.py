"""Heads whose parameters are computed: parametrizations, weight_norm, spectral_norm, pruning. Read once, folded as in eval mode, carried over."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from interflow_kernels import AuxiliaryHeads, FusedInterflowHead, InterflowHead
from interflow_kernels.testing import ATTENTIONS, assert_close

MAPS = [torch.randn(3, 4, 6, 5), torch.randn(3, 8, 3, 3)]
KINDS = [InterflowHead, FusedInterflowHead]


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, weight):
        self.calls += 1
        return 2 * weight


def prune_half(head):
    torch.manual_seed(1)
    prune.random_unstructured(head, "weight", 0.5)


DRESSES = {
    "parametrization": lambda head: parametrize.register_parametrization(head, "weight", Counted()),
    "attention": lambda head: parametrize.register_parametrization(head, "attention_weight", Counted()),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "old weight norm": weight_norm,
    "old spectral norm": spectral_norm,
    "pruned": prune_half,
    "two": lambda head: (prune_half(head), parametrize.register_parametrization(head, "bias", Counted())),
}
DRESSED = pytest.mark.parametrize("dress", [pytest.param(v, id=k) for k, v in DRESSES.items()])
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")


def dressed(kind, dress, attention="nxn"):
    torch.manual_seed(0)
    head = kind((4, 8), 5, attention)
    dress(head)
    return head


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_is_evaluated_once(kind, attention):
    head = kind((4, 8), 5, attention, attention_bias=attention != "hard")
    counters = {name: Counted() for name, _ in list(head.named_parameters())}
    for name, counter in counters.items():
        parametrize.register_parametrization(head, name, counter)
    uses = {
        "call": lambda: head(MAPS),
        "forward_branches": lambda: head.forward_branches(MAPS),
        "stage_weights": lambda: head.stage_weights(MAPS),
        "fold": head.fold,
        "repr": lambda: repr(head),
    }
    for use, call in uses.items():
        if use == "fold" and attention == "gated":
            continue
        for counter in counters.values():
            counter.calls = 0
        call()
        assert {name: counter.calls for name, counter in counters.items()} == dict.fromkeys(counters, 1), use


def test_auxiliary_heads_evaluate_once():
    heads = AuxiliaryHeads((4, 8), 5)
    counters = [Counted(), Counted()]
    for classifier, counter in zip(heads.classifiers, counters, strict=True):
        parametrize.register_parametrization(classifier, "weight", counter)
        counter.calls = 0
    heads(MAPS)
    assert [c.calls for c in counters] == [1, 1]


def state(head):
    return {name: t.clone() for name, t in head.state_dict().items()}


@DRESSED
def test_swapping_carries_over(dress):
    head = dressed(FusedInterflowHead, dress).eval()
    expected = head(MAPS)
    eager = head.to_eager()
    fused = FusedInterflowHead.from_eager(eager)
    assert isinstance(eager, InterflowHead) and not isinstance(eager, FusedInterflowHead)
    assert isinstance(fused, FusedInterflowHead)
    for other in (eager, fused):
        assert not other.training
        assert {t.device.type for t in other.state_dict().values()} == {"cpu"}
        assert list(other.state_dict()) == list(head.state_dict())
        for (name, a), (_, b) in zip(other.named_parameters(), head.named_parameters(), strict=True):
            assert a is b, name
        assert_close("y", other(MAPS), expected)
        with torch.no_grad():  # PyTorch's own hooks leave a weight that is no leaf, which does not copy
            other(MAPS)
            assert_close("copied", copy.deepcopy(other)(MAPS), expected)
    # Both train together.
    before = expected.detach().clone()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.mul_(1.5)
    after = head(MAPS)
    assert not torch.allclose(after, before)
    assert_close("together", fused(MAPS), after)


@DRESSED
def test_training_agrees(dress):
    """Gradients of what the parameters are computed from, each by name, fused beside plain."""
    plain, source = dressed(InterflowHead, dress), dressed(InterflowHead, dress)
    fused = FusedInterflowHead.from_eager(source)
    for head in (plain, fused):
        head(MAPS).square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), fused.named_parameters(), strict=True):
        assert_close(name, b.grad, a.grad, tolerance=1e-5)


@DRESSED
@pytest.mark.parametrize("kind", KINDS)
def test_fold_sees_the_weights_of_now(kind, dress):
    head = dressed(kind, dress)
    head(MAPS)
    with torch.no_grad():  # a step of an optimizer; hooks have not run since
        for parameter in head.parameters():
            parameter.mul_(1.25)
    kept, training = state(head), head.training
    folded, weights = head.fold(), head.stage_weights()
    assert all(torch.equal(t, kept[name]) for name, t in head.state_dict().items())
    assert head.training is training
    head.eval()
    y, branches = head.forward_branches(MAPS)
    assert_close("folded", folded(MAPS), y, tolerance=1e-5)
    assert_close("stage_weights", (weights * branches).sum(1), y, tolerance=1e-5)
    assert_close("called", head(MAPS), y)


def test_twins_are_taken_apart_one_by_one():
    head = dressed(FusedInterflowHead, DRESSES["parametrization"])
    expected, original = head(MAPS), head.parametrizations.weight.original
    eager = head.to_eager()
    parametrize.remove_parametrizations(eager, "weight", leave_parametrized=False)
    assert type(eager) is InterflowHead
    assert eager.weight is original
    assert parametrize.is_parametrized(head)
    assert torch.equal(head(MAPS), expected)
    eager = head.to_eager()
    eager.eval()
    assert head.training and head.parametrizations.weight[0].training


def test_other_hooks_stay_where_they_were_registered():
    head, calls = dressed(FusedInterflowHead, DRESSES["old weight norm"]), []
    head.register_forward_hook(lambda *_: calls.append("after"))
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.to_eager()(MAPS)
    assert calls == []
    head(MAPS)
    assert calls == ["before", "after"]
