"""The dry run leaves the backbone as it was; channels and layouts are the backbone's word; bad input gets one sentence."""

import sys
from collections import namedtuple

import pytest
import torch
from systems import DSSDPyramid, timm_model, torchvision_model
from torch import Tensor, nn

from interflow_vision import UserError, attach
from interflow_vision.backbones import choosing, probing
from interflow_vision.errors import MissingPackageError

timm = pytest.importorskip("timm", reason="timm and torchvision (extra [backbones]) are not installed")


class Maps(nn.Module):
    """Gives maps of these shapes [C, H, W], as `wrap` makes them."""

    def __init__(self, shapes, wrap=list) -> None:
        super().__init__()
        self.scale, self.shapes, self.wrap = nn.Parameter(torch.ones(())), shapes, wrap

    def forward(self, x: Tensor):
        return self.wrap([x.new_ones(len(x), *shape) * self.scale for shape in self.shapes])


def by_name(maps):
    return {f"p{i}": m for i, m in enumerate(maps)}


Output = namedtuple("Output", "feature_maps other")


@pytest.mark.parametrize("wrap", [list, tuple, by_name, lambda maps: Output(tuple(maps), 1)], ids=["list", "tuple", "dict", "feature_maps"])
def test_what_a_forward_may_return(wrap):
    net = attach(Maps([(4, 8, 8), (6, 4, 4)], wrap), 3, input_size=16)
    assert [s.channels for s in net.stages] == [4, 6] and net(torch.randn(2, 3, 16, 16)).shape == (2, 3)


def test_the_dry_run_leaves_everything_as_it_was():
    net = timm_model("resnet18")
    net.train()
    net.layer1.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [(name, m.training) for name, m in net.named_modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    made = attach(net, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert [(name, m.training) for name, m in net.named_modules() if "stage_end" not in name] == modes
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and made.training


def test_a_tracing_backbone_keeps_its_modes():
    model = torchvision_model("resnet18").eval()
    model.layer2.train()
    modes = [(name, m.training) for name, m in model.named_modules()]
    attach(model, 3, input_size=64)
    assert [(name, m.training) for name, m in model.named_modules()] == modes


def test_the_layout_is_never_read_from_a_shape():
    """test_mambaout's first map is [B, H, W, C] with H equal to C."""
    net = attach("test_mambaout", 3, stages=[0, 1, 2, 3], input_size=64)
    x = torch.randn(1, 3, 64, 64)
    first = net.backbone(x)[0]
    assert first.shape[1] == first.shape[3]
    assert net.stages[0].layout == "NHWC" and torch.equal(net.forward_maps(x)[0], first.permute(0, 3, 1, 2))
    swin = attach(torchvision_model("swin_t"), 3, input_size=32)
    assert {s.layout for s in swin.stages} == {"NHWC"} and [s.channels for s in swin.stages] == [96, 192, 384, 768]


def test_a_layout_that_contradicts_the_backbones_channels_is_refused():
    net = Maps([(8, 8, 4)])
    net.feature_info = [{"num_chs": 4, "reduction": 2}]
    with pytest.raises(ValueError, match=r"the backbone says that stage 0 has 4 channels, but its map is \[1, 8, 8, 4\] as NCHW; give the layout"):
        attach(net, 3, input_size=16)
    assert attach(net, 3, input_size=16, layout="NHWC").stages[0].channels == 4


@pytest.mark.parametrize(
    ("count", "places"), [(2, (0, 1)), (4, (0, 1, 2, 3)), (5, (1, 2, 3, 4)), (6, (2, 3, 4, 5)), (12, (2, 5, 8, 11)), (24, (5, 11, 17, 23))]
)
def test_default_stages(count, places):
    assert choosing.default_places(count) == places


def test_default_stages_of_a_network_that_keeps_its_size():
    assert choosing.default_places(6, [16] * 6) == (0, 2, 3, 5) and choosing.default_places(6, [2, 4, 8, 8, 16, 32]) == (2, 3, 4, 5)


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_class_tokens_are_dropped_or_kept(source):
    options = {"img_size": 32, "embed_dim": 32, "depth": 4, "num_heads": 2}
    if source == "timm":
        builds = [lambda drop: attach("vit_tiny_patch16_224", 3, drop_class_token=drop, **options)]
        builds.append(lambda drop: attach(timm.create_model("vit_tiny_patch16_224", **options), 3, drop_class_token=drop))
    else:
        from torchvision.models import VisionTransformer

        builds = [lambda drop: attach(VisionTransformer(32, 16, 4, 2, 32, 64), 3, drop_class_token=drop, input_size=32)]
    for build in builds:
        for drop, count in ((True, 4), (False, 5)):
            net = build(drop)
            assert [tuple(m.shape) for m in net.forward_maps(torch.randn(2, 3, 32, 32))] == [(2, 32, count, 1)] * 4
            assert {i["num_chs"] for i in net.feature_info} == {32}


def test_a_timm_model_that_classifies():
    """Its feature_info names the submodules; EfficientNet has no output_fmt."""
    net = attach(timm.create_model("efficientnet_lite0"), 3, input_size=64)
    expected = timm.create_model("efficientnet_lite0", features_only=True).feature_info.channels()[-4:]
    assert [s.channels for s in net.stages] == expected and {s.layout for s in net.stages} == {"NCHW"}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    ["shufflenet_v2_x0_5", "squeezenet1_1", *(pytest.param(name, marks=SLOW) for name in ("alexnet", "mobilenet_v3_small", "regnet_y_400mf", "mnasnet0_5"))],
)
def test_families_of_torchvision(name):
    net = attach(f"torchvision/{name}", 3, input_size=128)
    assert len(net.stages) <= 4 and net(torch.randn(2, 3, 128, 128)).shape == (2, 3)
    sizes = [m.shape[2] for m in net.forward_maps(torch.randn(1, 3, 128, 128))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) >= len(sizes) - 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: attach("resnet81", 3), r"backbone: timm has no model 'resnet81'; did you mean 'resnet18'"),
        (lambda: attach("torchvision/resnet81", 3), r"backbone: torchvision has no model 'resnet81'; did you mean 'resnet18'"),
        (lambda: attach("resnet18", 3, stages=[1, 7]), r"stages must be indices from -5 to 4 of the 5 maps of timm's resnet18, got \[1, 7\]"),
        (lambda: attach("resnet18", 3, stages=["layer1"]), r"stages must be indices for timm's resnet18, got \['layer1'\]"),
        (lambda: attach(Maps([(4, 8, 8)]), 3, stages=[1]), r"stages must be indices from -1 to 0 of the backbone's 1 maps, got 1"),
        (lambda: attach(Maps([(4, 8, 8)] * 2), 3, stages=[1, -1]), r"stages must differ from each other, got 1 twice"),
        (lambda: attach(torchvision_model("resnet18"), 3, stages=["layer1", "leyer2"]), r"has no node 'leyer2'; did you mean 'layer2"),
        (lambda: attach(DSSDPyramid(), 3, stages=["down.7"]), r"stages: the backbone has no submodule 'down.7'; did you mean 'down"),
        (lambda: attach(nn.Conv2d(3, 4, 3), 3), r"backbone must give a list, tuple or mapping of feature maps, got Tensor; name the submodules"),
        (lambda: attach(Maps([]), 3), r"backbone must give at least one feature map, got none"),
        (
            lambda: attach(Maps([(4,)], lambda maps: [m[:, 0] for m in maps]), 3),
            r"backbone must give maps \[B, C, H, W\] or tokens \[B, N, C\], got .*shape \(1,\)",
        ),
        (lambda: attach(Maps([(4, 8, 8)], lambda maps: [None]), 3), r"backbone must give tensors as its maps, got NoneType as number 0"),
        (lambda: attach(nn.Sequential(nn.Linear(5, 5)), 3, stages=["0"]), r"backbone cannot run on an image of shape \[1, 3, 224, 224\] .*give input_size"),
        (lambda: attach(DSSDPyramid(), 3, input_size=-1), r"input_size must be pixels of a side or \(C, H, W\)"),
        (lambda: attach(DSSDPyramid(), 3, head="best"), r"head must be one of 'fused', .*got 'best'"),
        (lambda: attach(DSSDPyramid(), 3, stage_end="best"), r"stage_end must be one of 'fused', 'eager', got 'best'"),
        (lambda: attach(DSSDPyramid(), 3, layout="CHWN"), r"layout must be one of 'NCHW', .*got 'CHWN'"),
        (lambda: attach(DSSDPyramid(), 3, layout=["NCHW"]), r"layout must be one string or 3, one for each stage, got 1"),
        (lambda: attach(DSSDPyramid(), 3, input_size=32).load_pretrained(), r"the backbone was not built by its name"),
    ],
)
def test_bad_input_gets_one_sentence(build, message):
    with pytest.raises(ValueError, match=message) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_wrong_kinds():
    with pytest.raises(TypeError, match="backbone must be an nn.Module or the name of a model of timm or torchvision, got 3"):
        attach(3, 3)
    with pytest.raises(TypeError, match="attach has no argument 'pretrained' for a backbone that is a module"):
        attach(DSSDPyramid(), 3, pretrained=True)
    with pytest.raises(TypeError, match="stages must be all indices or all names, got"):
        attach(DSSDPyramid(), 3, stages=[1, "down"])


@pytest.mark.parametrize(("package", "name"), [("timm", "resnet18"), ("torchvision", "torchvision/resnet18")])
def test_a_missing_package_is_named_with_the_line_that_installs_it(package, name, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'needs {package}, but it is not installed: pip install "interflow-kernels\[backbones\]"'):
        attach(name, 3)
    assert issubclass(MissingPackageError, UserError)


def test_a_submodule_that_does_not_run():
    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    with pytest.raises(ValueError, match="stages: idle did not run in the backbone's forward, so it has no map"):
        attach(Skips(), 3, stages=["used", "idle"], input_size=8)


def test_a_refused_attach_leaves_no_hook():
    net = DSSDPyramid()
    for options in ({"stages": ["down.0", "side.9"]}, {"stages": ["down.0"], "input_size": (5, 8, 8)}, {"stages": ["down.0"], "hard_weights": [1.0]}):
        with pytest.raises(ValueError, match="."):
            attach(net, 3, **options)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got -1"):
        attach(net, -1, stages=["down.0"])
    assert not any(module._forward_hooks for module in net.modules())


def test_it_is_said_that_class_tokens_are_left_out():
    assert "class tokens left out of the means: 1" in attach(timm.create_model("test_vit", img_size=32), 3).extra_repr()


@pytest.mark.parametrize(("name", "options", "channels"), [("csatv2", {}, 3), ("test_resnet", {"in_chans": 1}, 1), ("test_vit", {"in_chans": 5}, 5)])
def test_channels_of_the_image(name, options, channels):
    """csatv2's first convolution has 64 channels, behind a front end."""
    assert probing.image_size(timm.create_model(name, features_only=True, **options))[0] == channels
    assert probing.image_size(timm.create_model(name, **options))[0] == channels
