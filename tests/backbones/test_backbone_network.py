"""What attach gives: timm's conventions, freezing, rates by depth, checkpointing, copies, compilers, tracers and exporters."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from systems import DSSDPyramid, shallow_resnet, timm_model, torchvision_model
from torch import Tensor, fx, nn

from interflow_kernels import FoldedInterflowHead, FusedInterflowHead
from interflow_vision import InterflowNetwork, attach

timm = pytest.importorskip("timm", reason="timm and torchvision (extra [backbones]) are not installed")


def images(batch: int = 2, side: int = 64) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network() -> InterflowNetwork:
    return attach("resnet18", 5, input_size=64)


def plain_layers() -> nn.Module:
    """A residual network in a user's own code, by submodule names: one ReLU module for all places, as torchvision has it."""

    class Block(nn.Module):
        def __init__(self, c: int) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU(inplace=True)
            self.conv2 = nn.Conv2d(c, c, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv2(self.relu(self.bn(self.conv(x))))
            y += x
            return self.relu(y)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one = nn.Conv2d(3, 8, 3, 2, 1), Block(8)
            self.down, self.two = nn.Conv2d(8, 16, 3, 2, 1), Block(16)
            self.fc = nn.Linear(16, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.two(self.down(self.one(self.stem(x)))).mean((2, 3)))

    return Net()


def own(**options) -> InterflowNetwork:
    return attach(plain_layers(), 5, stages=["one", "two"], input_size=32, **options)


def test_timms_conventions(network):
    x = images()
    features = network.forward_features(x)
    assert [tuple(f.shape) for f in features] == [(2, 64), (2, 128), (2, 256), (2, 512)]  # the means that the stage ends give
    torch.testing.assert_close(network.forward_head(features), network(x))
    pooled = network.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, network.num_features) and network.num_features == network.head_hidden_size == 960
    assert network.get_classifier() is network.head and isinstance(network.head, FusedInterflowHead)
    assert next((i["num_chs"], i["reduction"], i["module"]) for i in network.feature_info) == (64, 4, "layer1")
    assert network.default_cfg["input_size"] == (3, 64, 64) and network.default_cfg["classifier"] == "head"
    network.reset_classifier(3, attention="gated")
    assert network(x).shape == (2, 3) and network.head.attention == "gated" and network.default_cfg["num_classes"] == 3
    network.reset_classifier(0)
    torch.testing.assert_close(network(x), pooled)


def test_parameters_keep_the_names_that_the_backbone_gives_them(network):
    backbone = timm_model("resnet18")
    keys = list(backbone.state_dict())
    assert [name for name in network.state_dict() if name.startswith("backbone.")] == [f"backbone.{key}" for key in keys]
    network.backbone.load_state_dict(backbone.state_dict())
    theirs = torchvision_model("resnet18")
    kept = [f"backbone.{key}" for key in theirs.state_dict() if not key.startswith("fc.")]
    assert [name for name in attach(theirs, 5, input_size=64).state_dict() if name.startswith("backbone.")] == kept


def test_what_does_not_decay():
    net = attach("vit_tiny_patch16_224", 5, img_size=32, embed_dim=32, depth=4, num_heads=2)
    assert net.no_weight_decay() == {"backbone.model.pos_embed", "backbone.model.cls_token", "head.bias", "head.attention_weight"}


def test_rates_by_depth(network):
    groups = network.parameter_groups(0.1, backbone_lr=0.01, layer_decay=0.5, weight_decay=1e-2)
    rates = {g["name"]: g["lr"] for g in groups}
    assert rates["head"] == rates["head, no decay"] == 0.1
    assert [rates[f"stage {i}"] for i in (1, 2, 3, 4)] == pytest.approx([0.00125, 0.0025, 0.005, 0.01])
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))
    first = {id(p) for g in groups if g["name"].startswith("stage 1") for p in g["params"]}
    assert first == {id(p) for name, p in network.named_parameters() if name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))}
    assert all(g["weight_decay"] == (0.0 if g["name"].endswith("no decay") else 1e-2) for g in groups)
    torch.optim.SGD(groups).step()
    from timm.optim import param_groups_layer_decay

    scales = {g["lr_scale"] for g in param_groups_layer_decay(network, layer_decay=0.5)}
    assert scales == {1.0, 0.5, 0.25, 0.125, 0.0625}
    with pytest.raises(ValueError, match="layer_decay must be above 0, got 0"):
        network.parameter_groups(0.1, layer_decay=0)


def test_frozen_stages_keep_weights_and_statistics(network):
    network.freeze(2)
    network.train()
    statistics = {name: b.clone() for name, b in network.named_buffers() if "running" in name}
    F.cross_entropy(network(images()), torch.tensor([0, 1])).backward()
    for name, p in network.named_parameters():
        frozen = name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1", "backbone.layer2"))
        assert (p.grad is None) == frozen, name
    for name, b in network.named_buffers():
        if name in statistics:
            still = name.startswith(("backbone.bn1", "backbone.layer1", "backbone.layer2"))
            assert torch.equal(b, statistics[name]) == still, name
    network.freeze(0)
    assert all(p.requires_grad for p in network.parameters())
    with pytest.raises(ValueError, match="stages must be a number from 0 to 4, or None for the whole backbone, got 5"):
        network.freeze(5)


@pytest.mark.parametrize("kind", ["extractor", "tokens"])
def test_gradient_checkpointing_changes_no_number(kind):
    net = attach("test_resnet", 5) if kind == "extractor" else attach("vit_tiny_patch16_224", 5, img_size=32, embed_dim=32, depth=4, num_heads=2)
    x = images(side=64 if kind == "extractor" else 32)
    found = []
    for enable in (False, True):
        net.zero_grad()
        net.set_grad_checkpointing(enable)
        y = net.eval()(x)
        y.square().sum().backward()
        found.append({"y": y.detach(), **{name: p.grad.clone() for name, p in net.named_parameters()}})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert not net._exchange._open
    with pytest.raises(ValueError, match="the backbone, DSSDPyramid, has no gradient checkpointing"):
        attach(DSSDPyramid(), 5, input_size=32).set_grad_checkpointing()


@pytest.mark.parametrize("build", [own, lambda: attach(shallow_resnet(), 5, input_size=64)], ids=["hooks", "graph"])
def test_copies_and_pickles_are_networks_of_their_own(build):
    net = build().eval()
    x = images()
    expected = net(x)
    copies = [copy.deepcopy(net)]
    if not isinstance(net.backbone, fx.GraphModule) and "<locals>" not in type(net.backbone).__qualname__:
        copies.append(pickle.loads(pickle.dumps(net)))
    for p in net.parameters():
        p.data.zero_()
    for other in copies:
        assert other._exchange is not net._exchange
        torch.testing.assert_close(other(x), expected)
        assert all(f.dim() == 2 for f in other.forward_features(x))


def test_a_whole_network_is_pickled():
    net = attach("test_resnet", 5).eval()
    x = images()
    other = pickle.loads(pickle.dumps(net))
    torch.testing.assert_close(other(x), net(x))
    assert all(f.dim() == 2 for f in other.forward_features(x))


BUILDS = {"hooks": own, "extractor": lambda: attach("test_resnet", 5), "graph": lambda: attach(shallow_resnet(), 5, input_size=64)}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "hooks" else pytest.mark.slow) for kind in BUILDS])
def test_compiled_whole(kind):
    """In one graph, forward and backward; the means of the stage ends are in it."""
    net = BUILDS[kind]().eval()
    x = images()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x), net(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    names, parameters = zip(*net.named_parameters(), strict=True)
    got = torch.autograd.grad(y.square().sum(), parameters, allow_unused=True)
    for name, g, e in zip(names, got, torch.autograd.grad(expected.square().sum(), parameters, allow_unused=True), strict=True):
        if e is None:
            assert g is None
        else:
            torch.testing.assert_close(g, e, rtol=1e-3, atol=1e-4 * float(e.abs().max()), msg=lambda text, name=name: f"{name}: {text}")
    assert not net._exchange._traced


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=() if kind == "hooks" else pytest.mark.slow) for kind in BUILDS])
def test_exported(kind):
    net = BUILDS[kind]().eval()
    x = images()
    program = torch.export.export(net, (x,))
    torch.testing.assert_close(program.module()(x), net(x), rtol=1e-4, atol=1e-4)
    assert not net._exchange._traced


def test_a_leaf_of_fx():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = own()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x * 2)

    outer = Two().eval()
    traced = fx.symbolic_trace(outer)
    assert [str(n.target) for n in traced.graph.nodes if n.op == "call_module"] == ["net"]
    torch.testing.assert_close(traced(images()), outer(images()))


def test_for_inference_folds_norms_behind_plain_convolutions_and_the_head():
    net = attach("resnet18", 5, input_size=64)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    net.train()
    ready = net.for_inference(channels_last=True)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ready.backbone.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.backbone.modules()) and net.training
    assert isinstance(ready.head, FoldedInterflowHead) and not any(p.requires_grad for p in ready.parameters())
    torch.testing.assert_close(ready(images()), net.eval()(images()), rtol=1e-3, atol=1e-3)
    assert ready.for_inference(torch.bfloat16)(images().bfloat16()).dtype == torch.bfloat16


def test_a_norm_whose_convolution_somebody_else_reads_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x: Tensor) -> list[Tensor]:
            y = self.conv(x)
            return [self.relu(self.bn(y) + y)]

    net = attach(Twice(), 5, input_size=16).eval()
    net.backbone.bn.running_mean.fill_(1.0)
    ready = net.for_inference()
    assert isinstance(ready.backbone.bn, nn.BatchNorm2d)
    torch.testing.assert_close(ready(images(side=16)), net(images(side=16)))


def test_timms_registry():
    from interflow_vision import register_timm_models

    assert "interflow_resnet18" in register_timm_models() and register_timm_models("test_resnet") == ["interflow_test_resnet"]
    net = timm.create_model("interflow_resnet18", num_classes=4, attention="gated", input_size=64)
    assert isinstance(net, InterflowNetwork) and net.head.attention == "gated" and net(images()).shape == (2, 4)
    assert "interflow_resnet50" in timm.list_models("interflow_*")
    with pytest.raises(ValueError, match=r"timm has no model 'resnet81'; did you mean 'resnet18'"):
        register_timm_models("resnet81")


def test_parameters_that_the_maps_do_not_depend_on():
    net = own()
    assert net.unused_parameters() == ["backbone.fc.weight", "backbone.fc.bias"]
    assert attach(torchvision_model("resnet18"), 5, input_size=64).unused_parameters() == []
    assert attach("resnet18", 5, input_size=64).unused_parameters() == []


def test_mixed_precision_casts_no_map(network):
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        features = network.forward_features(images())
        y = network(images())
    assert y.dtype == torch.bfloat16 and all(f.dtype == torch.float32 for f in features)  # means of bf16 maps
    torch.testing.assert_close(y.float(), network(images()), rtol=0.1, atol=0.1)
