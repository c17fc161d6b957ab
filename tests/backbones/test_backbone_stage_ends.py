"""Stage ends that give the mean with their map: put in only where the network stays the same, and used only for the very map they made."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from interflow_vision import attach
from interflow_vision.backbones import mean_relu


class Residual(nn.Module):
    """A residual block; `last` is what its forward does with the sum."""

    def __init__(self, c: int, last=None) -> None:
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(c, c, 3, padding=1), nn.ReLU(inplace=True), last

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x
        return self.relu(y) if self.last is None else self.last(self, y)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.after = nn.Conv2d(3, 6, 3, padding=1), block, nn.Conv2d(6, 8, 3)

    def forward(self, x: Tensor) -> list[Tensor]:
        m = self.block(self.stem(x))
        return [m, self.after(m)]


def images() -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def attached(net: nn.Module, **options):
    return attach(net, 4, input_size=12, **options)


def check(net: nn.Module, **options) -> str | None:
    """What was replaced at the first stage; the numbers and each gradient by name are those of the eager network."""
    state = list(net.state_dict())
    x = images()
    eager = attached(net, stage_end="eager", head="eager", **options)
    expected = eager(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in eager.named_parameters()}
    fused = attached(net, **options)
    assert list(fused.backbone.state_dict()) == state
    fused.head.load_state_dict(eager.head.state_dict())
    fused.zero_grad()
    y = fused(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    return fused.replaced.get(fused.stages[0].name)


def test_an_addition_and_a_relu_become_one_call():
    net = Net(Residual(6))
    assert check(net) == "addition and ReLU of block"
    assert [type(m).__name__ for m in net.block.children() if isinstance(m, mean_relu.MeanReLU)] == ["MeanReLU"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_module_is_replaced_where_nothing_is_added(inplace):
    assert check(Net(nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace)))) == "ReLU block.1"


def twice(block: nn.Module, y: Tensor) -> Tensor:
    return block.relu(block.relu(y) - 0.1)


def doubled(block: nn.Module, y: Tensor) -> Tensor:
    return block.relu(y) * 2


def read_before(block: nn.Module, y: Tensor) -> Tensor:
    v = F.relu(y)
    return v + 0 * y


def by_training(block: nn.Module, y: Tensor) -> Tensor:
    return block.relu(y) if block.training else F.relu(y)


def by_value(block: nn.Module, y: Tensor) -> Tensor:
    return block.relu(y) if y.sum() > -1e9 else y


@pytest.mark.parametrize("last", [doubled, read_before, twice, by_training], ids=lambda f: f.__name__)
def test_a_map_that_is_not_what_a_relu_gives_is_left(last):
    assert check(Net(Residual(6, last))) is None


def test_a_block_that_cannot_be_traced_keeps_its_addition_and_gets_the_relu():
    assert check(Net(Residual(6, by_value))) == "ReLU block.relu"


class MulAfter(nn.Module):
    """Writes over the map after the ReLU has given it."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        m = self.block(x)
        m.mul_(3)
        return [m]


def test_a_map_that_is_written_over_afterwards_is_left():
    net = MulAfter()
    fused, eager = attached(net), attached(net, stage_end="eager")
    eager.head.load_state_dict(fused.head.state_dict())
    assert not fused.replaced and type(net.block[1]) is nn.ReLU
    torch.testing.assert_close(fused(images()), eager(images()))


class Subclass(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked() -> nn.ReLU:
    relu = nn.ReLU()
    relu.register_forward_hook(lambda module, args, output: output * 2)
    return relu


@pytest.mark.parametrize(
    "relu", [Subclass, hooked, lambda: nn.ReLU6(), lambda: torch.compile(nn.ReLU(), backend="eager")], ids=["subclass", "hook", "other", "compiled"]
)
def test_a_relu_that_is_more_than_one_is_left(relu):
    made = relu()
    net = Net(nn.Sequential(nn.Conv2d(6, 6, 3), made))
    assert check(net) is None and net.block[1] is made


def test_hooks_on_a_block_keep_it_whole():
    block = Residual(6)
    seen = []
    block.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    net = Net(block)
    check(net)
    assert net.block is block and seen


@pytest.mark.parametrize("where", ["block", "block.relu", "block.stage_end"])
def test_a_hook_that_comes_later_is_respected(where):
    """It changes the map, so the mean that came with the old one is not used."""
    net = Net(Residual(6)) if where != "block.relu" else Net(nn.Sequential())
    if where == "block.relu":
        net.block.add_module("conv", nn.Conv2d(6, 6, 3))
        net.block.add_module("relu", nn.ReLU())
    fused = attached(net)
    assert fused.replaced and all(f.dim() == 2 for f in fused.forward_features(images())[:1])
    net.get_submodule(where).register_forward_hook(lambda module, args, output: output * 2)
    maps, features = fused.forward_maps(images()), fused.forward_features(images())
    means = [f if f.dim() == 2 else f.mean((2, 3)) for f in features]
    torch.testing.assert_close(means, [m.mean((2, 3)) for m in maps])


def test_a_hook_that_writes_over_the_map_later_is_respected():
    net = Net(Residual(6))
    fused = attached(net)
    net.block.register_forward_hook(lambda module, args, output: output.mul_(2) if not torch.is_grad_enabled() else None)
    with torch.no_grad():
        features = fused.forward_features(images())
        torch.testing.assert_close(features[0].mean((2, 3)), fused.forward_maps(images())[0].mean((2, 3)))
    assert features[0].dim() == 4


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__(Residual(6))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> list[Tensor]:
        m = checkpoint(self.block, self.stem(x), use_reentrant=self.reentrant) if self.training else self.block(self.stem(x))
        return [m, self.after(m)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_the_backbones_own_code(reentrant):
    net = Checkpointed(reentrant)
    fused = attached(net)
    assert fused.replaced
    eager = attached(net, stage_end="eager", head="eager")
    eager.head.load_state_dict(fused.head.state_dict())
    found = []
    for each in (fused, eager.eval()):
        each.zero_grad()
        each(images()).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in each.named_parameters()})
        fused.eval()
    for name, g in found[1].items():
        torch.testing.assert_close(found[0][name], g, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert not fused._exchange._open


def test_nothing_is_kept_between_forwards_and_threads_do_not_mix():
    fused = attached(Net(Residual(6))).eval()
    inputs = [torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    expected = [fused(x) for x in inputs]
    wrong = []

    def run(i: int) -> None:
        for _ in range(30):
            if not torch.equal(fused(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and not fused._exchange._open and not fused._exchange._traced


def test_a_failed_forward_leaves_no_parcel():
    fused = attached(Net(Residual(6)))
    with pytest.raises(RuntimeError):
        fused(torch.randn(1, 4, 12, 12))
    assert not fused._exchange._open


def test_the_replaced_block_works_outside_the_network():
    net = Net(Residual(6))
    x = torch.randn(1, 6, 5, 5)
    expected = net.block(x)
    attached(net)
    torch.testing.assert_close(net.block(x), expected)


def test_whole_maps_are_wanted_with_a_pool_size():
    net = Net(Residual(6))
    assert not attached(net, pool_size=2).replaced and isinstance(net.block, Residual)


def test_one_stage_that_cannot_have_its_mean_does_not_spoil_the_others():
    class Two(MulAfter):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [*super().forward(x), self.last(x)]

    net = Two()
    net.last = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    fused = attached(net)
    assert fused.replaced == {"1": "ReLU last.1"} and type(net.block[1]) is nn.ReLU


@pytest.mark.parametrize("wrap", [list, lambda maps: {f"p{i}": m for i, m in enumerate(maps)}], ids=["list", "dict"])
def test_a_backbone_that_is_a_graph_already(wrap):
    class Maps(Net):
        def forward(self, x: Tensor):
            return wrap(super().forward(x))

    net = torch.fx.symbolic_trace(Maps(Residual(6)))
    assert check(net).startswith("addition and ReLU at the end of")


@pytest.mark.parametrize("added_in_place", [False, True])
def test_an_addition_of_two_dtypes_gives_what_pytorchs_gives(added_in_place):
    from interflow_vision.backbones.exchange import Exchange

    u, residual = torch.randn(2, 3, 4, 4).bfloat16(), torch.randn(2, 3, 4, 4)
    v = mean_relu.MeanReLU(Exchange(), 0, added_in_place=added_in_place)(u, residual)
    expected = u.clone()
    expected = F.relu(expected.add_(residual) if added_in_place else expected + residual)
    assert v.dtype == expected.dtype and torch.equal(v, expected)
