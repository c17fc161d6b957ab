"""Which parameters decay: what VGG names for other trainers (timm's convention), and what ours leaves out."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from interflow_vision import create_model
from interflow_vision.training.optimization import decayed

HEAD = {"attention_weight", "attention_bias", "bias"}


def model(**options):
    return create_model("vgg16_bn", "gated", width=1 / 32, **options)


def test_names_are_those_of_the_network():
    assert model().no_weight_decay() == {f"head.{name}" for name in HEAD}
    for head in ("concat", "auxiliary", "last"):
        assert model(head=head).no_weight_decay() == set()


@pytest.mark.parametrize("wrap", [checkpoint_wrapper, lambda head: torch.compile(head, backend="eager"), nn.Sequential])
def test_names_are_those_of_a_wrapped_head(wrap):
    net = model()
    net.head = wrap(net.head)
    names = dict(net.named_parameters())
    assert {name.rsplit(".", 1)[1] for name in net.no_weight_decay()} == HEAD and net.no_weight_decay() <= set(names)


@pytest.mark.parametrize("computed", [False, True])
def test_ours_decays_convolutions_and_the_heads_weight(computed):
    net = model()
    if computed:  # names in which no "attention" and no "bias" stands at the end
        torch.nn.utils.parametrizations.weight_norm(net.head, "attention_weight")
    names = {name for name, p in net.named_parameters() if any(p is each for each in decayed(net))}
    assert names == {"head.weight", *(f"features.{name}.weight" for name, layer in net.features.items() if isinstance(layer, nn.Conv2d))}


def test_timm_makes_the_same_groups():
    timm = pytest.importorskip("timm.optim", reason="timm is not installed", exc_type=ImportError)
    net = model()
    none, some = timm.param_groups_weight_decay(net, 1e-2, no_weight_decay_list=net.no_weight_decay())
    assert none["weight_decay"] == 0.0 and {id(p) for p in some["params"]} == {id(p) for p in decayed(net)}
