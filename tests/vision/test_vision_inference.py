"""fuse, for_inference and branches go by what a network has become: other norms, replaced, wrapped and hooked layers, wrapped heads."""

import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune

from interflow_kernels import FoldedInterflowHead, FusedInterflowHead, StageTap, stage_tap
from interflow_vision import VGG, create_model
from interflow_vision.models.heads import ConcatHead


def trained(name: str = "vgg16_bn", **options) -> VGG:
    """A network whose norms and biases are not those it starts with."""
    torch.manual_seed(0)
    net = create_model(name, **{"width": 1 / 32, **options})
    spoil(net)
    return net.eval()


@torch.no_grad()
def spoil(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    for key, buffer in net.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_()
        if key.endswith("running_var"):
            buffer.uniform_(0.5, 2)


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))


def served(net: VGG, *named: str, x: Tensor | None = None) -> VGG:
    """fuse and for_inference, which give what the network gives, warn at most once, and name just these; the network stays as it is."""
    x = images() if x is None else x
    net.eval()
    want, before = net(x), {key: value.clone() for key, value in net.state_dict().items()}
    for step in (net.fuse, net.for_inference):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            ready = step()
        told = [str(w.message) for w in seen]
        assert len(told) == bool(named), told
        if named:
            assert told[0] == f"{step.__name__} leaves as it is what it cannot fold: {', '.join(named)}"
            assert seen[0].filename == __file__
        torch.testing.assert_close(ready(x), want, rtol=1e-3, atol=1e-4)
        for got, expected in zip(ready.forward_maps(x), net.forward_maps(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
        for info in ready.feature_info:
            assert isinstance(ready.get_submodule(info["module"]), StageTap)
        assert not ready.training
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    torch.testing.assert_close(net(x), want)
    return ready


def norms(net: nn.Module) -> list[str]:
    return [type(module).__name__ for module in net.modules() if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))]


def test_synchronised_norms_are_folded():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(trained())
    assert norms(net) == ["SyncBatchNorm"] * 13
    assert norms(served(net)) == []


def test_a_folded_network_leaves_its_biases_to_the_taps(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "interflow_kernels.modules.stage_tap.stage_tap", lambda u, shift, max_pool: seen.append(shift) or stage_tap(u, shift, max_pool=max_pool)
    )
    net = trained()
    net(images())
    assert seen == [None] * 5  # the norm is between
    fused = net.fuse()
    seen.clear()
    fused(images())
    assert [shift is fused.features[name].bias for shift, name in zip(seen, ("2", "7", "14", "21", "28"), strict=True)] == [True] * 5
    assert list(fused.features) == list(create_model("vgg16", width=1 / 32).features)
    assert not fused.batch_norm and net.batch_norm


def replaced(net: VGG, name: str, make) -> VGG:
    net.features[name] = make(net.features[name])
    spoil(net.features[name])
    return net


NORMS = {
    "GroupNorm": (lambda norm: nn.GroupNorm(2, norm.num_features), "GroupNorm"),
    "InstanceNorm": (lambda norm: nn.InstanceNorm2d(norm.num_features, affine=True), "InstanceNorm2d"),
    "no statistics": (lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False), "BatchNorm2d without running statistics"),
    "another layer": (lambda norm: nn.Tanh(), "Tanh, no batch norm"),
    "no affine": (lambda norm: nn.BatchNorm2d(norm.num_features, affine=False), None),
    "Identity": (lambda norm: nn.Identity(), None),
    "checkpoint": (checkpoint_wrapper, None),
    "compiled": (lambda norm: torch.compile(norm, backend="eager"), None),
    "Sequential": (nn.Sequential, None),
}


@pytest.mark.parametrize("place", ["1", "4", "8"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_of_every_kind(kind, place):
    make, named = NORMS[kind]
    ready = served(replaced(trained(), place, make), *([f"features.{place} ({named})"] if named else []))
    left = [layer for layer in ready.features.values() if not isinstance(layer, (nn.Conv2d, nn.ReLU, StageTap))]
    assert len(left) == bool(named)


class LowRank(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.more = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.more(x)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


CONVOLUTIONS = {
    "no bias": (lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 3, padding=1, bias=False), None),
    "circular": (lambda conv: nn.Conv2d(conv.in_channels, conv.out_channels, 5, padding=2, padding_mode="circular"), None),
    "checkpoint": (checkpoint_wrapper, None),
    "compiled": (lambda conv: torch.compile(conv, backend="eager"), None),
    "Sequential": (nn.Sequential, None),
    "weight norm": (parametrizations.weight_norm, None),
    "spectral norm": (parametrizations.spectral_norm, None),
    "LoRA": (LowRank, "BatchNorm2d behind LowRank"),
    "hook": (hooked, "BatchNorm2d behind features.3 with hooks"),
    "pruned": (lambda conv: prune.l1_unstructured(conv, "weight", amount=0.3), None),
    "older weight norm": (torch.nn.utils.weight_norm, None),
    "older spectral norm": (torch.nn.utils.spectral_norm, None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_every_kind(kind):
    make, named = CONVOLUTIONS[kind]
    ready = served(replaced(trained(), "3", make), *([f"features.4 ({named})"] if named else []))
    assert norms(ready) == ["BatchNorm2d"] * bool(named)


def test_hooks_on_a_norm_and_norms_inside_other_layers():
    net = trained()
    hooked(net.features["1"])
    net.features["7"] = nn.Sequential(net.features["7"], nn.BatchNorm2d(4))
    ready = served(net, "features.1 (BatchNorm2d with hooks)", "features.7 (a norm inside Sequential)", "features.8 (BatchNorm2d behind Sequential)")
    assert norms(ready) == ["BatchNorm2d"] * 3
    assert ready.batch_norm


def test_first_convolution_for_one_channel():
    ready = served(replaced(trained(), "0", lambda conv: nn.Conv2d(1, 2, 3, padding=1)), x=images(1))
    assert ready.features["0"].weight.shape == (2, 1, 3, 3)
    assert ready.in_channels == 1


def test_dtype_of_a_network_with_layers_that_stay():
    net = replaced(trained(), "4", lambda norm: nn.GroupNorm(2, norm.num_features))
    with pytest.warns(UserWarning, match="features.4"):
        half = net.for_inference(torch.bfloat16)
    assert half(images().bfloat16()).dtype == torch.bfloat16


# --- heads --------------------------------------------------------------------------------------------------------------
def weight_normed(head: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(head, "weight")


class Scaled(FusedInterflowHead):
    """A subclass whose forward is not the head's."""

    def forward(self, features):
        return 3 * super().forward(features)


def scaled(head: FusedInterflowHead) -> Scaled:
    head.__class__ = Scaled
    return head


class Outer(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.head(features) + 1


HEADS = {
    "as it is": (lambda head: head, None),
    "compiled": (lambda head: torch.compile(head, backend="eager"), None),
    "checkpoint": (checkpoint_wrapper, None),
    "Sequential": (nn.Sequential, None),
    "nested": (lambda head: nn.Sequential(checkpoint_wrapper(head)), None),
    "weight norm": (weight_normed, None),
    "pruned": (lambda head: prune.l1_unstructured(head, "weight", amount=0.3), None),
    "hook": (hooked, "head (FusedInterflowHead with hooks)"),
    "hook outside": (lambda head: hooked(nn.Sequential(head)), "head (Sequential)"),
    "subclass": (scaled, "head (Scaled)"),
    "outer": (Outer, "head (Outer)"),
}


@pytest.mark.parametrize("kind", HEADS)
def test_wrapped_heads(kind):
    make, named = HEADS[kind]
    torch._dynamo.reset()
    net = trained("vgg16")
    y, branches = net.forward_branches(images())
    net.head = make(net.head)
    want = net(images())
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        ready = net.for_inference()
    assert [str(w.message) for w in seen] == ([f"for_inference leaves as it is what it cannot fold: {named}"] if named else [])
    torch.testing.assert_close(ready(images()), want, rtol=1e-4, atol=1e-5)
    assert isinstance(ready.head, FoldedInterflowHead) == (named is None)
    assert net.has_branches == (kind not in ("hook outside", "outer"))
    if net.has_branches and kind not in ("subclass", "pruned"):
        got = net.forward_branches(images())
        torch.testing.assert_close(got[0], y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], branches, rtol=1e-4, atol=1e-5)
    elif not net.has_branches:
        with pytest.raises(ValueError, match=rf"the head, {type(net.head).__name__}, has no branches"):
            net.forward_branches(images())


@pytest.mark.parametrize("make", [lambda head: head, checkpoint_wrapper], ids=["as it is", "checkpoint"])
@pytest.mark.parametrize(
    "options", [dict(attention="gated"), dict(head="concat"), dict(head="last", pool5=False), dict(head="auxiliary"), dict(num_classes=0)], ids=str
)
def test_heads_that_nothing_can_fold(options, make):
    net = trained("vgg16", **options)
    net.head = make(net.head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready = net.for_inference()
    torch.testing.assert_close(ready(images()), net(images()))
    assert net.has_branches == (options.get("attention") == "gated" or options.get("head") == "auxiliary")


def test_one_warning_names_layers_and_head():
    net = replaced(trained(), "1", lambda norm: nn.GroupNorm(1, norm.num_features))
    hooked(net.head)
    with pytest.warns(UserWarning, match="leaves as it is") as seen:
        net.for_inference()
    assert [str(w.message) for w in seen] == ["for_inference leaves as it is what it cannot fold: features.1 (GroupNorm), head (FusedInterflowHead with hooks)"]


def test_a_head_put_in_by_hand():
    net = trained("vgg16")
    net.head = nn.Identity()  # as timm's users do it
    assert net(images()).shape == (2, sum(info["num_chs"] for info in net.feature_info))
    net.head = ConcatHead([info["num_chs"] for info in net.feature_info], 3)
    net.head.fc = checkpoint_wrapper(net.head.fc)
    assert net(images()).shape == (2, 3)
    assert not net.has_branches
    last = trained("vgg16", head="last", stages=(4, 9), pool5=False)
    last.head = checkpoint_wrapper(last.head)
    assert last.forward_head(last.forward_features(images()), pre_logits=True).shape == (2, 16)


def test_wrapped_layers_of_auxiliary_heads():
    net = trained("vgg16", head="auxiliary")
    want = net.forward_branches(images())
    for i, make in enumerate((checkpoint_wrapper, nn.Sequential, lambda layer: torch.compile(layer, backend="eager"))):
        net.head.classifiers[i] = make(net.head.classifiers[i])
    for got, expected in zip(net.forward_branches(images()), want, strict=True):
        torch.testing.assert_close(got, expected)
