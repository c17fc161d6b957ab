"""Every system that Interflow's description names carries the fused head: logits and each gradient by name are those of the eager head."""

import pytest
import torch
import torch.nn.functional as F
from systems import SYSTEMS, System, images
from torch import Tensor

from interflow_vision import InterflowNetwork, attach, create_model

ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated")
pytest.importorskip("timm", reason="timm and torchvision (extra [backbones]) are not installed")


def pair(system: System, attention: str) -> tuple[InterflowNetwork, InterflowNetwork]:
    """The system with fused head and stage ends, and the same weights in plain PyTorch."""
    options = {"input_size": system.side, **system.options}
    fused = attach(system.build(), 5, attention=attention, **options)
    eager = attach(system.build(), 5, attention=attention, head="eager", stage_end="eager", **options)
    assert list(fused.state_dict()) == list(eager.state_dict()) and not eager.replaced
    eager.load_state_dict(fused.state_dict())
    return fused, eager


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
            bound = rtol * float(gradient.abs().max()) + 2e-6 * largest
            torch.testing.assert_close(got[name], gradient, rtol=rtol, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", SYSTEMS)
def test_the_fused_head_on_a_system(name, channels_last):
    system = SYSTEMS[name]
    fused, eager = pair(system, ATTENTIONS[list(SYSTEMS).index(name) % 5])
    assert len(fused.replaced) == system.ends
    if channels_last:
        fused, eager = (net.to(memory_format=torch.channels_last) for net in (fused, eager))
    compare(fused, eager, images(system, channels_last), 1e-3)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_attention_on_a_pyramid(attention):
    system = SYSTEMS["DSSD's pyramid"]
    fused, eager = pair(system, attention)
    compare(fused, eager, images(system, False), 1e-3)


def test_the_same_weights_give_the_same_maps_in_all_three_vggs():
    """torchvision's, timm's and ours: the stages end after conv2_2, conv3_3, conv4_3 and conv5_3."""
    from torchvision.models.vgg import cfgs, make_layers

    theirs, named = (SYSTEMS[f"VGG-16, {library}"].build() for library in ("torchvision", "timm"))
    ours = create_model("vgg16_bn", width=1 / 8, num_classes=0).eval()
    weights = {name: value for name, value in named.state_dict().items() if name.startswith("features.")}
    ours.load_torchvision_convolutions(weights)
    theirs.features = make_layers([c if c == "M" else c // 8 for c in cfgs["D"]], batch_norm=True)
    theirs.classifier = torch.nn.Identity()
    theirs.load_state_dict(weights)
    x = torch.randn(1, 3, 32, 32)
    expected = ours.forward_maps(x)
    for net in (attach(theirs, 3, input_size=32), attach(named, 3, input_size=64)):
        for m, e in zip(net.eval().forward_maps(x), expected, strict=True):
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
