"""torch.utils.flop_counter, torch.profiler and weight decay: what tools of PyTorch's users see of our operators and modules."""

from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from interflow_kernels import FusedInterflowHead, StageEnd, StageTap
from interflow_kernels.testing import ATTENTIONS

MAPS = ((4, 6, 5), (8, 3, 3), (2, 1, 1))


def maps(batch=3, requires_grad=True):
    return [torch.randn(batch, *each, requires_grad=requires_grad) for each in MAPS]


def flops(call, backward):
    with FlopCounterMode(display=False) as counter:
        y = call()
        if backward:
            torch.autograd.backward([t.sum() for t in y] if isinstance(y, tuple) else y.sum())
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("pool_size", [1, 2])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_head_counts_what_its_twin_in_plain_pytorch_counts(attention, pool_size, backward):
    head = FusedInterflowHead(tuple(each[0] for each in MAPS), 7, attention, pool_size=pool_size)
    for method in ("forward", "forward_branches"):
        found, expected = (flops(partial(getattr(each, method), maps()), backward) for each in (head, head.to_eager()))
        assert found == expected > 0


def test_a_head_with_a_norm_counts_what_its_twin_counts():
    head = FusedInterflowHead(tuple(each[0] for each in MAPS), 7, norm="batch")
    found, expected = (flops(partial(each, maps()), True) for each in (head, head.to_eager()))
    assert found == expected > 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_needs_no_gradient_counts_none(attention):
    def counted(head, names, inputs):
        for name, parameter in head.named_parameters():
            parameter.requires_grad_(name in names)
        given = [x.requires_grad_(inputs) for x in maps(requires_grad=False)]
        return flops(lambda: head(given), True)

    head = FusedInterflowHead(tuple(each[0] for each in MAPS), 7, attention)
    for names, inputs in ((("weight",), False), ((), True), (("bias",), False), (("weight", "bias"), True), (("attention_weight",), False)):
        if names == ("attention_weight",) and attention == "hard":
            continue  # nothing would need a gradient
        assert counted(head, names, inputs) == counted(head.to_eager(), names, inputs), (names, inputs)


def test_the_folded_head_counts_one_product():
    head = FusedInterflowHead(tuple(each[0] for each in MAPS), 7).fold()
    assert flops(lambda: head(maps(requires_grad=False)), False) == 2 * 3 * 7 * sum(each[0] for each in MAPS)


@pytest.mark.parametrize("end", [StageTap, StageEnd])
def test_the_end_of_a_stage_counts_no_product(end):
    u = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert flops(lambda: end()(u), True) == 0
    with FlopCounterMode(display=False) as counter:
        StageTap()(u)
    assert torch.ops.interflow_kernels.stage_tap in counter.flop_registry


def test_the_counter_may_be_imported_before_and_after():
    """The formulas wait for the counter, whose import takes a second; either order registers them."""
    import subprocess
    import sys

    check = "assert torch.ops.interflow_kernels.interflow_head in torch.utils.flop_counter.flop_registry"
    late = f"import sys, torch, interflow_kernels\nassert 'torch.utils.flop_counter' not in sys.modules\nimport torch.utils.flop_counter\n{check}"
    early = f"import torch, torch.utils.flop_counter, interflow_kernels\n{check}"
    for code in (late, early):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_profiler_names():
    """Operators by their names, autograd's steps by those of the operators they belong to."""
    head, tap = FusedInterflowHead((4,), 3), StageTap()
    u = torch.randn(2, 4, 4, 4, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        m, p = tap(u)
        (head([m]).sum() + p.sum()).backward()
    names = {event.name for event in seen.events()}
    for name in ("interflow_head", "stage_tap"):
        words = "".join(word.capitalize() for word in name.split("_"))
        expected = {
            f"interflow_kernels::{name}",
            f"interflow_kernels::{name}_backward",
            f"{words}Function",
            f"{words}FunctionBackward",
            f"{words}BackwardFunction",
        }
        assert expected <= names, expected - names
    assert type(head([u]).grad_fn).__name__ == "InterflowHeadFunctionBackward"


# --- weight decay ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_weight_decay_names_all_but_the_weight(attention):
    options = {} if attention == "hard" else {"attention_bias": True}
    head = FusedInterflowHead((4, 8), 3, attention, **options)
    names = {name for name, _ in head.named_parameters()}
    assert head.no_weight_decay() == names - {"weight"}
    assert ("attention_weight" in head.no_weight_decay()) == (attention != "hard")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_weight_decay_of_computed_parameters():
    head = torch.nn.utils.parametrizations.weight_norm(FusedInterflowHead((4, 8), 3), "weight")
    torch.nn.utils.parametrizations.weight_norm(head, "attention_weight")
    assert head.no_weight_decay() == {"bias", *(f"parametrizations.attention_weight.original{i}" for i in (0, 1))}
    old = torch.nn.utils.weight_norm(FusedInterflowHead((4, 8), 3), "weight")
    assert old.no_weight_decay() == {"bias", "attention_weight"}
