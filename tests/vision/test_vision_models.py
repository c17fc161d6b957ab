"""VGG-16 and its heads: one test per property over all models."""

import math
import subprocess
import sys
import warnings
from itertools import accumulate
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interflow_kernels import FoldedInterflowHead, StageTap
from interflow_vision import VGG, create_model, list_models
from interflow_vision.errors import MissingPackageError
from interflow_vision.models.heads import HEADS
from interflow_vision.models.stages import EagerStageEnd
from interflow_vision.models.vgg import STAGES

MODELS = ("vgg16", "vgg16_bn")
ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated")
COMBINATIONS = [(head, attention) for head in ("fused", "eager") for attention in ATTENTIONS] + [(head, "nxn") for head in HEADS[2:]]
SMALL = 1 / 32
TORCHVISION = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")  # its configuration "D"


def small(name: str = "vgg16", **options) -> VGG:
    torch.manual_seed(0)
    return create_model(name, **{"width": SMALL, **options})


def images(batch: int = 4, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def torchvision_layers(batch_norm: bool, width: float = 1.0) -> nn.Sequential:
    """What torchvision's make_layers builds, and so how its weights are named."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in TORCHVISION:
        if entry == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            out = round(entry * width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), *([nn.BatchNorm2d(out)] if batch_norm else []), nn.ReLU()]
            channels = out
    return nn.Sequential(*layers)


def maps_after(layers: nn.Sequential, x: Tensor, convolutions: list[int]) -> list[Tensor]:
    """The ReLU outputs after the given numbers of convolutions."""
    found, count = [], 0
    for layer in layers:
        x = layer(x)
        if isinstance(layer, nn.ReLU):
            count += 1
            if count in convolutions:
                found.append(x.clone())
    return found


def test_names():
    assert list_models() == ["vgg16", "vgg16_bn"]
    with pytest.raises(ValueError, match="name must be one of 'vgg16', 'vgg16_bn', or 'plainN' with N convolutions, got 'vgg99'"):
        create_model("vgg99")
    with pytest.raises(ValueError, match=r"head must be one of .*got 'middle'"):
        small(head="middle")


@pytest.mark.parametrize(("head", "attention"), COMBINATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_forward_backward(name, head, attention):
    model = small(name, head=head, attention=attention, num_classes=7).train()
    y = model(images())
    assert y.shape == ((4, 4, 7) if head == "auxiliary" else (4, 7))
    loss = model.head.loss(y, torch.arange(4)) if head == "auxiliary" else F.cross_entropy(y, torch.arange(4))
    loss.backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert model.eval()(images()).shape == (4, 7)


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("name", MODELS)
def test_fused_and_eager_head_swap(name, attention):
    fused = small(name, head="fused", attention=attention).eval()
    eager = create_model(name, head="eager", attention=attention, width=SMALL).eval()
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert not torch.equal(fused(images()), eager(images()))
    eager.load_state_dict(fused.state_dict())
    for got, expected in zip(fused.forward_branches(images()), eager.forward_branches(images()), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_trunk_is_the_same_for_every_head_and_split(name):
    first = small(name).eval()
    trunk = first.features.state_dict()
    for head in HEADS:
        for stages in (None, (13,), (1,) * 13, (2, 2, 3, 3, 3)):
            other = create_model(name, head=head, stages=stages, width=SMALL).eval()
            assert {k: v.shape for k, v in other.features.state_dict().items()} == {k: v.shape for k, v in trunk.items()}
            other.features.load_state_dict(trunk)
            if not (head == "last" and other.min_size == 32):
                torch.testing.assert_close(other.forward_maps(images())[-1], first.forward_maps(images())[-1])


@pytest.mark.parametrize("stages", [STAGES, (13,), (2, 2, 3, 3, 3), (1,) * 13, (5, 8), (3, 4, 6), (12, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_split(name, stages):
    model = small(name, stages=stages).eval()
    plain = torchvision_layers(name == "vgg16_bn", SMALL).eval()
    plain.load_state_dict(model.features.state_dict())
    expected = maps_after(plain, images(), list(accumulate(stages)))
    got = model.forward_maps(images())
    assert len(got) == len(stages) == model.head.num_stages
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(model.forward_features(images()), expected, strict=True):  # a mean where a tap ends the stage
        torch.testing.assert_close(a, b.mean((2, 3)) if a.dim() == 2 else b)


@pytest.mark.parametrize("stages", [(4, 3, 3), (4, 3, 3, 4), (0, 13), (14, -1), (4.0, 9), (13, 0)])
def test_bad_split(stages):
    with pytest.raises(ValueError, match="stages must be 1 to 16 whole numbers of at least 1 whose sum is the 13 convolutions"):
        small(stages=stages)


@pytest.mark.parametrize("pool5", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_plain_network(name, pool5):
    model = small(name, head="last", pool5=pool5).eval()
    plain = torchvision_layers(name == "vgg16_bn", SMALL).eval()
    plain.load_state_dict(model.features.state_dict())
    x = (plain if pool5 else plain[:-1])(images(size=64))
    assert x.shape[2:] == ((2, 2) if pool5 else (4, 4))
    torch.testing.assert_close(model(images(size=64)), model.head.fc(x.mean((2, 3))))
    assert model.min_size == (32 if pool5 else 16)


def test_concat_head_is_one_layer_on_all_pooled_features():
    model = small(head="concat").eval()
    pooled = torch.cat([x.mean((2, 3)) for x in model.forward_maps(images())], 1)
    torch.testing.assert_close(model(images()), model.head.fc(pooled))
    assert sum(p.numel() for p in model.head.parameters()) == pooled.shape[1] * 10 + 10


@pytest.mark.parametrize("stage", ["fused", "eager"])
@pytest.mark.parametrize("head", HEADS)
def test_timm_conventions(head, stage):
    model = small(head=head, num_classes=7, stage=stage).eval()
    x = images(size=64)
    features = model.forward_features(x)
    assert len(features) == len(model.feature_info)
    for feature, feature_map, info in zip(features, model.forward_maps(x), model.feature_info, strict=True):
        assert feature_map.shape == (4, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"])
        mean_only = stage == "fused" and head != "last"  # the plain network's feature is the map after pool5
        assert feature.shape == ((4, info["num_chs"]) if mean_only else feature_map.shape)
        assert isinstance(model.get_submodule(info["module"]), StageTap if stage == "fused" else EagerStageEnd)
    assert torch.equal(model.forward_head(features), model(x))
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (4, sum(info["num_chs"] for info in model.feature_info))
    assert model.get_classifier() is model.head
    assert model.num_classes == 7
    model.reset_classifier(3)
    assert (model(x).shape, model.num_classes) == ((4, 3), 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert torch.equal(model(x), pre_logits)


def test_reset_classifier_keeps_dtype_and_changes_attention():
    model = small().double()
    model.reset_classifier(5, attention="gated")
    assert model.head.attention == "gated"
    assert model.head.weight.dtype == torch.float64
    assert model(images().double()).shape == (4, 5)


def test_forward_branches():
    model = small(attention="1xn").eval()
    y, branches = model.forward_branches(images())
    assert branches.shape == (4, 4, 10)
    torch.testing.assert_close(y, branches.mean(1))  # every attention starts as the mean
    auxiliary = small(head="auxiliary").eval()
    y, branches = auxiliary.forward_branches(images())
    assert torch.equal(y, branches[:, -1])
    for head in ("concat", "last"):
        assert not small(head=head).has_branches
        with pytest.raises(ValueError, match=r"the head, \w+Head, has no branches"):
            small(head=head).forward_branches(images())


def test_options_reach_the_head():
    model = small(attention="hard", hard_weights=[1.0, 2.0, 3.0, 4.0], pool_size=2, stage="eager")
    assert model.head.attention_weight.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert model.head.pool_size == (2, 2)
    assert small(attention="nxn", attention_bias=True).head.attention_bias.shape == (4,)
    assert small(head="auxiliary", auxiliary_weight=0.5).head.loss_weight == 0.5
    with pytest.raises(ValueError, match="pool_size must be 1 for head='auxiliary', got 2"):
        small(head="auxiliary", pool_size=2, stage="eager")


# --- the ends of blocks and stages ------------------------------------------------------------------------------------
def gradients(model: VGG, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = getattr(model.head, "loss", F.cross_entropy)
    loss(model(x), torch.arange(len(x)) % 10).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_fused_and_eager_stages_give_the_same(name, head, memory_format):
    fused = small(name, head=head).to(memory_format=memory_format).double()
    eager = small(name, head=head, stage="eager").to(memory_format=memory_format).double()
    assert list(fused.state_dict()) == list(eager.state_dict())
    eager.load_state_dict(fused.state_dict())
    x = images().double().contiguous(memory_format=memory_format)
    torch.testing.assert_close(fused(x), eager(x))
    expected = gradients(eager, x)
    for key, got in gradients(fused, x).items():
        torch.testing.assert_close(got, expected[key], msg=lambda m, key=key: f"{key}: {m}")
    taps = [layer for layer in fused.features.values() if isinstance(layer, StageTap)]
    assert [tap.max_pool for tap in taps] == [True] * 4 + [head == "last"]
    assert not any(isinstance(layer, StageTap) for layer in eager.features.values())


def test_a_map_that_goes_on_has_no_tap():
    model = small(stages=(1,) * 13)  # every convolution ends a stage
    for i, layer in enumerate(list(model.features.values())[1::2], 1):
        assert isinstance(layer, StageTap if i in (2, 4, 7, 10, 13) else EagerStageEnd), i
    eager = small(stages=(1,) * 13, stage="eager")
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images()), eager(images()))


def test_pool_size_needs_maps_and_says_so_once(monkeypatch):
    monkeypatch.setattr("interflow_vision.models.stages._said_eager", False)
    with pytest.warns(UserWarning, match=r"pool_size=\(2, 2\) needs whole maps"):
        model = small(pool_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small(pool_size=2)
    ends = [layer for layer in model.features.values() if isinstance(layer, (EagerStageEnd, StageTap))]
    assert [isinstance(end, StageTap) for end in ends] == [True, False, False, False, False]  # only the max-pool without a branch
    eager = small(pool_size=2, stage="eager")
    eager.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images(size=64)), eager(images(size=64)))


def test_unknown_stage():
    with pytest.raises(ValueError, match="stage must be one of 'fused', 'eager', got 'both'"):
        small(stage="both")


@pytest.mark.parametrize("head", ["fused", "last", "concat"])
def test_autocast_trains(head):
    model = small("vgg16_bn", head=head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(images())
    assert y.dtype == torch.bfloat16
    F.cross_entropy(y.float(), torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


# --- serving ------------------------------------------------------------------------------------------------------------
def trained(name: str, **options) -> VGG:
    """A network whose norms have seen images and whose parameters are not those they start with."""
    model = small(name, **options).train()
    with torch.no_grad():
        for seed in range(3):
            model(torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 + 1)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.mark.parametrize("stage", ["fused", "eager"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", MODELS)
def test_fuse(name, head, stage):
    model = trained(name, head=head, stage=stage).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = model.fuse()
    assert not fused.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    torch.testing.assert_close(fused(images().double()), model(images().double()))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    reloaded = create_model("vgg16", head=head, stage=stage, width=SMALL).double().eval()
    reloaded.load_state_dict(fused.state_dict())
    assert torch.equal(reloaded(images().double()), fused(images().double()))


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_for_inference(attention, channels_last):
    model = trained("vgg16_bn", attention=attention)
    ready = model.for_inference(channels_last=channels_last)
    torch.testing.assert_close(ready(images()), model(images()), rtol=1e-4, atol=1e-4)
    assert isinstance(ready.head, FoldedInterflowHead) == (attention != "gated")
    assert not any(p.requires_grad for p in ready.parameters())
    weight = ready.features["2"].weight
    assert weight.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    half = model.for_inference(torch.bfloat16)
    y = half(images().bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), model(images()), rtol=0.1, atol=0.2)
    with pytest.raises(TypeError, match=r"dtype must be floating point or None, got torch.int8"):
        model.for_inference(torch.int8)


@pytest.mark.parametrize(("head", "size"), [("fused", 16), ("last", 32)])
def test_image_size(head, size):
    model = small(head=head).eval()
    assert model(images(size=size)).shape == (4, 10)
    with pytest.raises(ValueError, match=f"x must be at least {size} x {size} pixels for this model's max-pools, got {size - 1} x {size - 1}"):
        model(images(size=size - 1))
    with pytest.raises(ValueError, match=r"x must be images \[B, 3, H, W\], got shape \(4, 1, 32, 32\)"):
        model(images(channels=1))
    assert small(head=head, in_channels=1)(images(channels=1)).shape == (4, 10)


@pytest.mark.parametrize(("options", "message"), [({"width": 0.0}, "width must be greater than 0"), ({"in_channels": 0}, "in_channels must be at least 1")])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_initial_weights_are_torchvisions():
    model = small("vgg16", width=1.0)
    for module in model.features.values():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * 9))  # kaiming normal, fan_out, relu
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
            assert not module.bias.any()


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_convolutions(name):
    torch.manual_seed(3)
    source = torchvision_layers(name == "vgg16_bn")
    given = {f"features.{key}": value for key, value in source.state_dict().items()} | {"classifier.0.weight": torch.zeros(2, 2)}
    model = create_model(name)
    model.load_torchvision_convolutions(given)
    for got, expected in zip(model.eval().forward_maps(images(1)), maps_after(source.eval(), images(1), [4, 7, 10, 13]), strict=True):
        torch.testing.assert_close(got, expected)
    with pytest.raises(ValueError, match=r"features.0.weight is \[64, 3, 3, 3\], this model's \[2, 3, 3, 3\]; pretrained weights need width=1"):
        small(name).load_torchvision_convolutions(given)
    with pytest.raises(ValueError, match="need width=1 and in_channels=3"):
        create_model(name, in_channels=1).load_torchvision_convolutions(given)
    other = "vgg16" if name == "vgg16_bn" else "vgg16_bn"
    with pytest.raises(ValueError, match=f"it needs those of torchvision's {other}$"):
        small(other).load_torchvision_convolutions(given)


def test_pretrained_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(MissingPackageError, match=r'pretrained=True needs torchvision, but it is not installed: pip install "interflow-kernels\[vision\]"'):
        small(pretrained=True)


def test_pretrained_asks_torchvision_for_its_imagenet_weights(monkeypatch):
    source = {f"features.{key}": value for key, value in torchvision_layers(True).state_dict().items()}
    asked = []

    def get_weight(name):
        asked.append(name)
        return SimpleNamespace(get_state_dict=lambda progress: source)

    fake = ModuleType("torchvision")
    fake.models = SimpleNamespace(get_weight=get_weight)
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    model = create_model("vgg16_bn", pretrained=True)
    assert asked == ["VGG16_BN_Weights.IMAGENET1K_V1"]
    assert torch.equal(model.features["0"].weight, source["features.0.weight"])


def test_importing_the_package_needs_torch_only():
    code = "import interflow_vision, sys; print(*sorted({'lightning', 'torchvision', 'sklearn', 'matplotlib', 'PIL', 'yaml'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
