"""Every system that Interflow's description names carries the fused head: logits and each gradient by name are those of the eager head."""

import pytest
import torch
import torch.nn.functional as F
from systems import SYSTEMS, System, images
from torch import Tensor, nn

from interflow_vision import InterflowNetwork, attach

ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated")
pytest.importorskip("timm", reason="timm and torchvision (extra [backbones]) are not installed")


def pair(system: System, attention: str, dtype: torch.dtype) -> tuple[InterflowNetwork, InterflowNetwork]:
    """The system with fused head and stage ends, and the same weights in plain PyTorch."""
    fused = attach(system.build(), 5, attention=attention, **system.options)
    eager = attach(system.build(), 5, attention=attention, head="eager", stage_end="eager", **system.options)
    assert list(fused.state_dict()) == list(eager.state_dict()) and not eager.replaced
    eager.load_state_dict(fused.state_dict())
    return fused.to(dtype), eager.to(dtype)


def gradients(net: InterflowNetwork, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Logits, and the gradient of the image and of each parameter; None where one has none."""
    x = x.clone().requires_grad_()
    y = net(x)
    F.cross_entropy(y, torch.arange(len(x)) % 5).backward()
    return y, {"image": x.grad, **{name: p.grad for name, p in net.named_parameters()}}


def compare(fused: InterflowNetwork, eager: InterflowNetwork, x: Tensor, rtol: float) -> None:
    y, got = gradients(fused, x)
    expected_y, expected = gradients(eager, x)
    torch.testing.assert_close(y, expected_y, rtol=rtol, atol=rtol)
    assert got.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    for name, gradient in expected.items():
        if gradient is None:
            assert got[name] is None, name
        else:  # a bias before a norm has the gradient 0, of which rounding is left
            bound = rtol * max(float(gradient.abs().max()), 1e-8 * largest)
            torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


CHEAP = [name for name in SYSTEMS if not name.startswith("SSD")]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CHEAP)
def test_the_fused_head_on_a_system(name, channels_last):
    """In fp64 and training mode, so that norms over small maps do not magnify rounding."""
    system = SYSTEMS[name]
    fused, eager = pair(system, ATTENTIONS[CHEAP.index(name) % 5], torch.float64)
    assert len(fused.replaced) == system.ends
    if channels_last:
        fused, eager = (net.to(memory_format=torch.channels_last) for net in (fused, eager))
    compare(fused, eager, images(system, channels_last).double(), 1e-6)


@pytest.mark.parametrize("channels_last", [pytest.param(False, id="nchw"), pytest.param(True, id="channels_last", marks=pytest.mark.slow)])
def test_the_fused_head_on_ssds_base(channels_last):
    """Six maps. torchvision fixes the widths and the least size, so this is the largest system; it has no norm."""
    system = SYSTEMS["SSD's VGG-16 base"]
    fused, eager = pair(system, "nxn", torch.float32)
    assert len(fused.stages) == 6 and len(fused.replaced) == system.ends
    compare(fused, eager, images(system, channels_last), 1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_on_a_pyramid(attention):
    system = SYSTEMS["DSSD's pyramid"]
    fused, eager = pair(system, attention, torch.float64)
    compare(fused, eager, images(system, False).double(), 1e-6)


def test_the_same_weights_give_the_same_maps_in_all_three_vggs():
    """torchvision's, timm's and ours: the stages end after conv2_2, conv3_3, conv4_3 and conv5_3."""
    from torchvision.models.vgg import VGG, cfgs, make_layers

    from interflow_vision import create_model

    theirs = VGG(make_layers(cfgs["D"]), num_classes=3)
    theirs.classifier = nn.Identity()
    ours = create_model("vgg16", num_classes=0)
    ours.load_torchvision_convolutions(theirs.state_dict())
    named = attach("vgg16", 3, input_size=32)
    named.backbone.load_state_dict({name.replace("features.", "features_"): value for name, value in theirs.state_dict().items()})
    x = torch.randn(1, 3, 32, 32)
    expected = ours.forward_maps(x)
    for net in (attach(theirs, 3, input_size=32), named):
        for m, e in zip(net.forward_maps(x), expected, strict=True):
            torch.testing.assert_close(m, e)


def test_googlenets_own_auxiliary_classifiers_as_the_comparison():
    """Both train three classifiers with CE + 0.3 * (CE + CE); GoogLeNet's own at 4a and 4d are deeper than a layer each."""
    import torchvision

    net = torchvision.models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    x, target = torch.randn(2, 3, 64, 64), torch.tensor([1, 3])
    output = net.train()(x)
    own = F.cross_entropy(output.logits, target) + 0.3 * (F.cross_entropy(output.aux_logits1, target) + F.cross_entropy(output.aux_logits2, target))
    ours = attach(net, 5, head="auxiliary", stages=["inception4a", "inception4d", "inception5b"])
    branches = ours(x)
    assert branches.shape == (2, 3, 5)
    loss = ours.head.loss(branches, target)
    z = [F.cross_entropy(branches[:, i], target) for i in range(3)]
    torch.testing.assert_close(loss, z[2] + 0.3 * (z[0] + z[1]))
    for each in (own, loss):
        each.backward()
    assert ours.backbone.inception4a.branch1.conv.weight.grad is not None
    assert not any(name.startswith("backbone.aux") for name in ours.state_dict())
