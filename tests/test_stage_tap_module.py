"""StageTap as a module, and conv_tap: who adds the bias, for every way in which a convolution may be more than a plain one."""

import copy
import pickle
import types
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

from interflow_kernels import StageTap, conv_tap, stage_tap
from interflow_kernels.modules.plain import is_plain
from interflow_kernels.testing import TapCase, assert_close, tap_inputs


def test_stage_tap_module():
    u, shift = tap_inputs(TapCase())
    for tap in (StageTap(), StageTap(False)):
        assert not list(tap.parameters()) and not tap.state_dict()
        assert repr(tap) == f"StageTap(max_pool={tap.max_pool})"
        for other in (tap, copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
            for given in (shift, None):
                for got, want in zip(other(u, given), stage_tap(u, given, max_pool=tap.max_pool), strict=True):
                    assert (got is None and want is None) or torch.equal(got, want)


def convolution(seed: int = 1, **options) -> nn.Conv2d:
    """4 -> 6 channels, its bias far from zero."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 6, 3, **options)
    with torch.no_grad():
        if conv.bias is not None:
            conv.bias.copy_(torch.linspace(-1, 2, 6))
    return conv


def images() -> torch.Tensor:
    return torch.randn(2, 4, 12, 11, generator=torch.Generator().manual_seed(2))


class Spy(StageTap):
    """Keeps what it is given: no plain StageTap, so it gets everything."""

    def forward(self, u, shift=None):
        self.given = shift
        return super().forward(u, shift)


@pytest.fixture
def shifts(monkeypatch):
    """What the taps of a test are given as shift, call by call."""
    seen = []
    monkeypatch.setattr(
        "interflow_kernels.modules.stage_tap.stage_tap", lambda u, shift, max_pool: seen.append(shift) or stage_tap(u, shift, max_pool=max_pool)
    )
    return seen


def check(module: nn.Module, tap: nn.Module | None = None) -> None:
    """conv_tap on `module` beside ReLU, max-pool and mean of its whole output: m, p, and each gradient by name."""
    other, x, y = copy.deepcopy(module), images().requires_grad_(), images().requires_grad_()
    m, p = conv_tap(module, StageTap() if tap is None else tap, x)
    v = F.relu(other(y))
    assert_close("m", m, F.max_pool2d(v, 2, 2))
    assert_close("p", p, v.mean((2, 3)))
    (m.square().sum() + p.square().sum()).backward()
    (F.max_pool2d(v, 2, 2).square().sum() + v.mean((2, 3)).square().sum()).backward()
    for (name, a), b in zip([("x", x), *module.named_parameters()], [y, *other.parameters()], strict=True):
        assert a.grad is not None, name
        assert_close(name, a.grad, b.grad, 1e-5)


CONVOLUTIONS = [
    dict(),
    dict(padding=1),
    dict(padding=1, padding_mode="reflect"),
    dict(padding="same", padding_mode="circular"),
    dict(groups=2, stride=2),
    dict(dilation=2),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_plain_convolution_leaves_its_bias(options, shifts):
    conv = convolution(**options)
    check(conv)
    assert shifts == [conv.bias]
    assert shifts[0] is conv.bias


def hooked(register: str, hook: Callable) -> Callable[[nn.Module], nn.Module]:
    def wrap(conv: nn.Module) -> nn.Module:
        getattr(conv, register)(hook)
        return conv

    return wrap


class LowRank(nn.Module):
    """conv(x) + up(down(x)), as LoRA wraps a convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv, self.down, self.up = conv, nn.Conv2d(4, 1, 3, bias=False), nn.Conv2d(1, 6, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


class Doubled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled(conv: nn.Conv2d) -> nn.Module:
    conv.__class__ = Doubled
    return conv


def own_forward(conv: nn.Conv2d) -> nn.Module:
    conv.forward = types.MethodType(lambda self, x: 2 * F.conv2d(x, self.weight, self.bias), conv)
    return conv


def compiled_in_place(conv: nn.Conv2d) -> nn.Module:
    conv.compile(backend="eager")
    return conv


def checkpointed(conv: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(conv)


class Tagged(torch.Tensor):
    """A tensor subclass, as quantised weights and DTensor are."""

    def new_empty(self, *size, **options):
        return super().new_empty(*size, **options).as_subclass(Tagged)


def tagged(conv: nn.Conv2d) -> nn.Module:
    conv.weight = nn.Parameter(conv.weight.detach().as_subclass(Tagged))
    return conv


ALTERED = {
    "Sequential": nn.Sequential,
    "compiled": lambda conv: torch.compile(conv, backend="eager"),
    "compiled in place": compiled_in_place,
    "checkpoint": checkpointed,
    "LoRA": LowRank,
    "subclass": doubled,
    "own forward": own_forward,
    "weight norm": parametrizations.weight_norm,
    "spectral norm": lambda conv: parametrizations.spectral_norm(conv).eval(),
    "forward hook": hooked("register_forward_hook", lambda module, args, output: 2 * output),
    "forward pre-hook": hooked("register_forward_pre_hook", lambda module, args: (2 * args[0],)),
    "full backward hook": hooked("register_full_backward_hook", lambda module, inputs, outputs: tuple(None if g is None else 2 * g for g in inputs)),
    "backward pre-hook": hooked("register_full_backward_pre_hook", lambda module, outputs: tuple(2 * g for g in outputs)),
    "tensor subclass": tagged,
    "no bias": lambda conv: convolution(bias=False),
}


@pytest.mark.parametrize("kind", ALTERED)
def test_any_other_is_called_as_it_is(kind, shifts):
    torch._dynamo.reset()
    check(ALTERED[kind](convolution()))
    assert set(shifts) == {None}


@pytest.mark.parametrize("wrap", [prune.l1_unstructured, torch.nn.utils.spectral_norm, torch.nn.utils.weight_norm], ids=["pruned", "spectral", "weight"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_computes(wrap, shifts):
    """Modules of the older kind, which copy.deepcopy refuses: built twice."""
    options = dict(amount=0.5) if wrap is prune.l1_unstructured else {}
    module, other, x = (wrap(convolution(), "weight", **options), wrap(convolution(), "weight", **options), images())
    torch.manual_seed(0)
    other.load_state_dict(module.state_dict())
    m, p = conv_tap(module.eval(), StageTap(), x)
    v = F.relu(other.eval()(x))
    assert_close("m", m, F.max_pool2d(v, 2, 2))
    (m.sum() + p.sum()).backward()
    (F.max_pool2d(v, 2, 2).sum() + v.mean((2, 3)).sum()).backward()
    for (name, a), b in zip(module.named_parameters(), other.parameters(), strict=True):
        assert_close(name, a.grad, b.grad, 1e-5)
    assert shifts == [None]


TAPS = {
    "compiled": lambda tap: torch.compile(tap, backend="eager"),
    "checkpoint": checkpointed,
    "Sequential": nn.Sequential,
    "subclass": lambda tap: Spy(),
    "hook": hooked("register_forward_hook", lambda module, args, output: None),
}


@pytest.mark.parametrize("kind", TAPS)
def test_any_other_tap_gets_everything(kind, shifts):
    torch._dynamo.reset()
    check(convolution(), TAPS[kind](StageTap()))
    assert set(shifts) == {None}  # once more where backward runs it again


def test_hooks_see_the_whole_output():
    conv, x, seen = convolution(), images(), []
    want = conv(x)
    conv.register_forward_hook(lambda module, args, output: seen.append(output))
    conv_tap(conv, StageTap(), x)
    assert torch.equal(seen[0], want)


@pytest.mark.parametrize("register", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_hooks_of_all_modules_count(register, shifts):
    seen = []
    handle = getattr(nn.modules.module, f"register_module_{register}")(lambda module, *_: seen.append(type(module)))
    try:
        check(convolution())
    finally:
        handle.remove()
    assert shifts == [None] and nn.Conv2d in seen
    check(convolution())
    assert shifts[1] is not None


def test_patched_classes_count(monkeypatch):
    conv = convolution()
    assert is_plain(conv, nn.Conv2d)
    forward = nn.Conv2d.forward
    with monkeypatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", lambda self, x: 2 * forward(self, x))
        check(conv)
        assert not is_plain(conv, nn.Conv2d)
    with monkeypatch.context() as patch:
        inner = nn.Conv2d._conv_forward
        patch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: inner(self, x, w, b) * (1 if b is None else 3))
        check(convolution())


def test_folding_a_norm_into_the_convolution(shifts):
    """torch's own fusion gives a convolution with another bias: conv_tap takes that one."""
    conv, norm = convolution().eval(), nn.BatchNorm2d(6).eval()
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            tensor.normal_()
        norm.running_var.uniform_(0.5, 2)
    x = images()
    want = F.relu(norm(conv(x)))
    m, p = conv_tap(fuse_conv_bn_eval(conv, norm), StageTap(), x)
    assert_close("m", m, F.max_pool2d(want, 2, 2), 1e-5)
    assert_close("p", p, want.mean((2, 3)), 1e-5)
    assert shifts[0] is not None


class Stage(nn.Module):
    def __init__(self, wrap=lambda conv: conv):
        super().__init__()
        self.conv, self.tap = wrap(convolution()), StageTap()

    def forward(self, x):
        return conv_tap(self.conv, self.tap, x)


@pytest.mark.parametrize("strict", [True, False])
def test_export_leaves_the_bias_too(strict):
    stage, x = Stage(), images()
    program = torch.export.export(stage, (x,), strict=strict)
    convolutions = [node for node in program.graph.nodes if "conv2d" in str(node.target)]
    assert len(convolutions) == 1 and len([a for a in convolutions[0].args[:3] if a is not None]) == 2  # input and weight
    for got, want in zip(program.module()(x), stage(x), strict=True):
        assert torch.equal(got, want)
    hooked_stage = Stage(ALTERED["forward hook"])
    for got, want in zip(torch.export.export(hooked_stage, (x,), strict=strict).module()(x), hooked_stage(x), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["plain", "Sequential", "checkpoint", "weight norm", "forward hook", "LoRA"])
def test_compiles_whole(kind):
    torch._dynamo.reset()
    stage, x = Stage(ALTERED.get(kind, lambda conv: conv)), images()
    compiled = torch.compile(stage, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, stage):
        m, p = f(x)
        results.append([m, p, *torch.autograd.grad(m.square().sum() + p.sum(), list(stage.parameters()))])
    for got, want in zip(*results, strict=True):
        assert_close(kind, got, want, 1e-5)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16), (torch.float64, torch.bfloat16)], ids=str)
def test_autocast_to_another_dtype_than_the_bias(dtypes):
    conv, x = convolution().to(dtypes[0]), images().to(dtypes[0])
    with torch.autocast("cpu", dtype=dtypes[1]):
        (m, p), v = conv_tap(conv, StageTap(), x), F.relu(conv(x))
    assert m.dtype == v.dtype
    assert_close("m", m, F.max_pool2d(v, 2, 2), 2e-2)
    assert_close("p", p, v.float().mean((2, 3)).to(p.dtype), 2e-2)


def test_copies_and_pickles():
    stage, x = Stage(), images()
    for other in (copy.deepcopy(stage), pickle.loads(pickle.dumps(stage))):
        assert all(torch.equal(a, b) for a, b in zip(other(x), stage(x), strict=True))
