"""VGG with layers that a user has wrapped, hooked, replaced or sharded: the same numbers with fused stages as with eager ones, each gradient by name."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper, offload_wrapper
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from interflow_kernels import InterflowHead, StageTap
from interflow_vision import VGG, create_model
from interflow_vision.models.wrappers import unwrapped

SOME = ("0", "2", "7", "14")  # convolutions of vgg16: two inside and three before a tap


def model(name: str = "vgg16", **options) -> VGG:
    """A small network whose biases are far from zero."""
    torch.manual_seed(0)
    made = create_model(name, **{"width": 1 / 32, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.5, 1, len(parameter)))
    return made


def images(batch: int = 2, size: int = 16, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def gradients(net: VGG, x: Tensor) -> dict[str, Tensor]:
    net.zero_grad()
    F.cross_entropy(net(x), torch.arange(len(x))).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def compare(fused: VGG, eager: VGG, x: Tensor | None = None) -> None:
    """Logits, features' maps and each gradient by name."""
    x = images() if x is None else x
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    for got, want in zip(fused.forward_maps(x), eager.forward_maps(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    wanted = gradients(eager, x)
    for name, got in gradients(fused, x).items():
        assert got is not None, name
        torch.testing.assert_close(got, wanted[name], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


class LowRank(nn.Module):
    """conv(x) + up(down(x)), as LoRA wraps a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.down = conv, nn.Conv2d(conv.in_channels, 1, 3, padding=1, bias=False)
        self.up = nn.Conv2d(1, conv.out_channels, 1, bias=False)
        nn.init.ones_(self.down.weight)
        nn.init.ones_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


def with_hook(register: str, hook):
    def wrap(layer: nn.Module) -> nn.Module:
        getattr(layer, register)(hook)
        return layer

    return wrap


WRAPPERS = {
    "Sequential": nn.Sequential,
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "reentrant checkpoint": lambda layer: checkpoint_wrapper(layer, checkpoint_impl=_reentrant()),
    "offload": offload_wrapper,
    "LoRA": LowRank,
    "weight norm": parametrizations.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "forward hook": with_hook("register_forward_hook", lambda module, args, output: output * 2),
    "pre-hook": with_hook("register_forward_pre_hook", lambda module, args: (args[0] * 2,)),
    "full backward hook": with_hook("register_full_backward_hook", lambda module, inputs, outputs: tuple(g if g is None else 2 * g for g in inputs)),
    "backward pre-hook": with_hook("register_full_backward_pre_hook", lambda module, outputs: (2 * outputs[0],)),
    "seen": with_hook("register_forward_hook", lambda module, args, output: None),
    "seen backward": with_hook("register_full_backward_hook", lambda module, inputs, outputs: None),
    "no bias": lambda layer: nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False),
}
SAME = (
    "Sequential",
    "compiled",
    "checkpoint",
    "reentrant checkpoint",
    "offload",
    "weight norm",
    "seen",
    "seen backward",
)  # these compute what was there before


def _reentrant():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl

    return CheckpointImpl.REENTRANT


def wrap(net: VGG, kind: str, names=SOME) -> VGG:
    torch._dynamo.reset()
    torch.manual_seed(2)
    for name in names:
        net.features[name] = WRAPPERS[kind](net.features[name])
    return net


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning", "ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_wrapped_convolutions(kind):
    fused, eager = wrap(model(), kind), wrap(model(stage="eager"), kind)
    x = images().requires_grad_(kind == "reentrant checkpoint")
    compare(fused, eager, x)
    if kind in SAME:
        torch.testing.assert_close(fused(x), model(stage="eager")(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["Sequential", "checkpoint", "seen", "seen backward"])
@pytest.mark.parametrize("what", ["norm", "relu", "end"])
def test_other_wrapped_layers(what, kind):
    fused, eager = model("vgg16_bn"), model("vgg16_bn", stage="eager")
    names = [name for name, place in fused.features.places.items() if place.role == what][:3]
    compare(wrap(fused, kind, names), wrap(eager, kind, names))


def test_activation_checkpointing_of_every_convolution():
    fused = model()
    apply_activation_checkpointing(fused, check_fn=lambda layer: isinstance(layer, nn.Conv2d))
    eager = model(stage="eager")
    torch.testing.assert_close(fused(images()), eager(images()), rtol=1e-4, atol=1e-5)
    wanted = gradients(eager, images())
    for name, got in gradients(fused, images()).items():
        torch.testing.assert_close(got, wanted[name.replace("_checkpoint_wrapped_module.", "")], rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    assert list(fused.state_dict()) == list(eager.state_dict())


@pytest.mark.parametrize("stage", ["fused", "eager"])
@pytest.mark.parametrize("name", ["vgg16", "vgg16_bn"])
def test_hooks_see_each_output_as_it_is(name, stage):
    """With its bias, and not what an in-place ReLU makes of it afterwards."""
    net, seen = model(name, stage=stage).eval(), {}
    for key, layer in net.features.items():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.register_forward_hook(lambda module, args, output, key=key: seen.update({key: (args[0], output)}))
    net(images())
    assert len(seen) == (26 if name == "vgg16_bn" else 13)
    for key, (x, output) in seen.items():
        torch.testing.assert_close(output, type(net.features[key]).forward(net.features[key], x), msg=lambda m, key=key: f"features.{key}: {m}")


def test_the_image_is_not_written_over():
    net, x = model(stage="eager"), images()
    net.features["0"] = nn.Conv2d(3, 3, 1)
    net.features["2"] = nn.Identity()
    before = x.clone()
    net.features["0"] = nn.Identity()
    with pytest.raises(RuntimeError):
        net(x)  # the next convolution's channels do not fit
    assert torch.equal(x, before)


def test_a_layer_that_is_no_end():
    net = model()
    net.features["3"] = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    with pytest.raises(
        ValueError, match=r"features.3 must give the next layer's input and the stage's feature, as StageTap and EagerStageEnd do, got Tensor from Sequential"
    ):
        net(images())


@pytest.mark.parametrize("stage", ["fused", "eager"])
def test_first_convolution_for_one_channel(stage):
    net = model(stage=stage)
    net.features["0"] = nn.Conv2d(1, 2, 3, padding=1)
    assert net.in_channels == 1
    assert net(images(channels=1)).shape == (2, 10)
    with pytest.raises(ValueError, match=r"x must be images \[B, 1, H, W\], got shape \(2, 3, 16, 16\)"):
        net(images())
    net.features["0"] = torch.compile(nn.Conv2d(4, 2, 3, padding=1), backend="eager")
    assert net.in_channels == 4
    net.features["0"] = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 2, 3, padding=1), nn.Upsample(scale_factor=2))
    assert net(images()).shape == (2, 10)  # what a layer of another kind takes is its own affair
    assert net.rebuilt().in_channels == 3


def test_fusing_a_norm_by_hand():
    """torch.nn.utils.fusion on a convolution of a fused network."""
    net = model().eval()
    norm = nn.BatchNorm2d(net.features["2"].out_channels).eval()
    nn.init.normal_(norm.bias)
    nn.init.normal_(norm.running_mean)
    eager = model(stage="eager").eval()
    eager.features["2"] = nn.Sequential(eager.features["2"], norm)
    net.features["2"] = fuse_conv_bn_eval(net.features["2"], norm)
    torch.testing.assert_close(net(images()), eager(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [None, "Sequential", "checkpoint", "forward hook"])
def test_compiles_whole_exports_and_copies(kind):
    net, x = model().eval(), images()
    if kind:
        wrap(net, kind)
    want = net(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(copy.deepcopy(net)(x), want)
    if kind != "forward hook":  # the hook is a lambda, which does not pickle
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), want)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), want, rtol=1e-4, atol=1e-5)


class Leaves(torch.fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, (StageTap, InterflowHead)) or super().is_leaf_module(module, name)


@pytest.mark.parametrize("stage", ["fused", "eager"])
def test_fx_keeps_the_modules(stage):
    net = model(stage=stage).eval()
    graph = Leaves().trace(net)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert [name for name in called if isinstance(net.get_submodule(name), nn.Conv2d)] == [
        f"features.{k}" for k in net.features if f"{k}.weight" in net.features.state_dict()
    ]
    torch.testing.assert_close(torch.fx.GraphModule(net, graph)(images()), net(images()), rtol=1e-4, atol=1e-5)


def test_state_dict_of_another_stage_loads():
    fused, eager = model(), model(stage="eager")
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert list(fused.state_dict())[:3] == ["features.0.weight", "features.0.bias", "features.2.weight"]
    wrapped = wrap(model(), "Sequential", ["3"])  # a tap has no parameters
    wrapped.load_state_dict(eager.state_dict())


def test_unwrapped():
    layer = nn.Linear(1, 1)
    for kind in ("Sequential", "compiled", "checkpoint", "offload"):
        assert unwrapped(WRAPPERS[kind](layer)) is layer, kind
        assert unwrapped(nn.Sequential(WRAPPERS[kind](layer))) is layer, kind
        hooked = WRAPPERS[kind](layer)
        hooked.register_forward_hook(lambda module, args, output: -output)
        assert unwrapped(hooked) is hooked, kind
    for other in (nn.Sequential(layer, layer), nn.Sequential(), nn.ModuleList([layer]), StageTap(), LowRank(nn.Conv2d(1, 1, 1))):
        assert unwrapped(other) is other
