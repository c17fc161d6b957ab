"""norm="batch": against the plain fp64 head, every gradient by name; statistics, folding, conversions, wiring; what it may not cost."""

import copy
import pickle

import pytest
import torch
from torch import nn

from interflow_kernels import FusedInterflowHead, InterflowHead
from interflow_kernels.testing import ATTENTIONS, Counted, HeadCase, assert_close, gradients, head_inputs, in_layout

MAPS = ((5, 13, 9), (32, 14, 14), (7, 3, 4))
LINEAR = [a for a in ATTENTIONS if a != "gated"]


def normed(attention="nxn", kind=FusedInterflowHead, maps=MAPS, classes=10, **options):
    """A head with a norm whose parameters and statistics are all drawn."""
    options = {"attention_bias": attention != "hard", **options}
    head = kind([c for c, _, _ in maps], classes, attention, norm="batch", **options)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in (*head.named_parameters(), *head.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.randn(tensor.shape, generator=g, dtype=torch.float64)
                tensor.copy_(drawn.abs() + 0.5 if name in ("norm.running_var", "norm.weight") else drawn / tensor.shape[-1] ** 0.5)
    return head


def inputs(batch=6, layout="contiguous", dtype=torch.float32, maps=MAPS):
    return head_inputs(HeadCase(batch=batch, maps=maps, layout=layout, dtype=dtype))


# --- against the plain head in fp64 ---------------------------------------------------------------------------------------
# Of the largest element: dividing by a standard deviation lets errors of sums grow. Worst seen: fp64 7e-16, fp32 6e-7.
ROOM = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "permuted"])
@pytest.mark.parametrize("dtype", ROOM, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_outputs_gradients_and_statistics(attention, training, dtype, layout):
    head = normed(attention).to(dtype).train(training)
    exact = copy.deepcopy(head).to_eager().double()
    maps = inputs(layout=layout, dtype=dtype)
    dy, dz = torch.randn(6, 10, dtype=torch.float64), torch.randn(6, 3, 10, dtype=torch.float64)
    for use in ((dy, dz), (dy, None), (None, dz)):
        got, got_gradients = gradients(head, maps, *(None if t is None else t.to(dtype) for t in use))
        want, want_gradients = gradients(exact, [x.double() for x in maps], *use)
        for name, expected in want.items():
            assert_close(name, got[name], expected, ROOM[dtype])
        assert set(got_gradients) == {"features[0]", "features[1]", "features[2]", *(name for name, _ in head.named_parameters())}
        for name, expected in want_gradients.items():
            if expected is None:
                assert got_gradients[name] is None or not got_gradients[name].any(), name
                continue
            assert_close(name, got_gradients[name], expected, ROOM[dtype])
    for name in ("running_mean", "running_var"):
        assert_close(name, getattr(head.norm, name), getattr(exact.norm, name), ROOM[dtype])
    assert int(head.norm.num_batches_tracked) == (3 if training else 0)


def test_the_plain_head_is_batch_norms_on_each_stage():
    head = normed(kind=InterflowHead).double().train()
    maps = inputs(dtype=torch.float64)
    norms = [nn.BatchNorm1d(width).double() for width in head.widths]
    for name in ("weight", "bias", "running_mean", "running_var"):
        for norm, part in zip(norms, getattr(head.norm, name).split(head.widths), strict=True):
            getattr(norm, name).data.copy_(part)
    scores = [nn.functional.linear(norm(x.mean((2, 3))), head.branch_weight(i), head.bias[i]) for i, (norm, x) in enumerate(zip(norms, maps, strict=True))]
    y, branches = head.forward_branches(maps)
    assert_close("branches", branches, torch.stack(scores, 1))
    assert_close("y", y, (head.stage_weights()[None] * branches).sum(1) + head.attention_bias.sum())
    assert_close("running_mean", head.norm.running_mean, torch.cat([norm.running_mean for norm in norms]))


@pytest.mark.parametrize("pool_size", [(2, 2), (3, 1)])
def test_windows(pool_size):
    head = normed(pool_size=pool_size).train()
    exact, maps = copy.deepcopy(head).to_eager().double(), inputs()
    dy = torch.randn(6, 10)
    (_, got), (_, want) = gradients(head, maps, dy, None), gradients(exact, [x.double() for x in maps], dy.double(), None)
    for name, expected in want.items():
        assert_close(name, got[name], expected, 1e-5)


@pytest.mark.parametrize("attention", ["classwise", "gated"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck(attention, training):
    maps = [x.requires_grad_() for x in inputs(batch=3, dtype=torch.float64, maps=((2, 2, 2), (1, 1, 2)))]
    head = normed(attention, maps=((2, 2, 2), (1, 1, 2)), classes=2).double().train(training)
    named = dict(head.named_parameters())

    def run(*tensors):
        given = dict(zip(named, tensors[2:], strict=True)) | {k: v.clone() for k, v in head.named_buffers()}
        return torch.func.functional_call(head, given, (list(tensors[:2]),))

    assert torch.autograd.gradcheck(run, (*maps, *(p.detach().requires_grad_() for p in named.values())))


def test_low_precision_under_autocast():
    head, maps = normed().train(), [x.bfloat16() for x in inputs()]
    exact = copy.deepcopy(head).to_eager().double()
    with torch.autocast("cpu", torch.bfloat16):
        y = head(maps)
    assert y.dtype == torch.bfloat16
    assert_close("y", y.float(), exact([x.double() for x in maps]), 2e-2)
    assert head.norm.running_mean.dtype == torch.float32
    low = normed().bfloat16().train()
    assert low(maps).dtype == torch.bfloat16


# --- from taps, from maps -------------------------------------------------------------------------------------------------
def called(run):
    with Counted() as counted:
        run()
    return [str(op).removeprefix("interflow_kernels.").removesuffix(".default") for op in counted.operators if "interflow_kernels" in str(op)]


def test_maps_are_read_once_and_means_not_at_all():
    head, maps = normed().train(), inputs()
    assert called(lambda: head(maps)) == ["interflow_pool", "interflow_head"]
    assert called(lambda: head.forward_branches(maps)) == ["interflow_pool", "interflow_head"]
    assert called(lambda: head([x.mean((2, 3)) for x in maps])) == ["interflow_head"]
    leaves = [x.requires_grad_() for x in maps]
    y = head(leaves)
    found = called(lambda: torch.autograd.grad(y.sum(), leaves))
    assert found == ["interflow_head_backward"]


def test_means_give_what_maps_give():
    for mode in (True, False):
        head, maps = normed().train(mode), inputs(dtype=torch.float32)
        other = copy.deepcopy(head)
        assert_close("y", other([x.mean((2, 3)) for x in maps]), head(maps), 1e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_maps_gradient_stays_a_view(layout):
    head, leaves = normed().train(), [x.requires_grad_() for x in inputs(layout=layout)]
    for g in torch.autograd.grad(head(leaves).sum(), leaves):
        assert g.stride()[2:] == (0, 0)
        assert g.untyped_storage().nbytes() <= 4 * 6 * sum(head.widths)


class Made(torch.utils._python_dispatch.TorchDispatchMode):
    """Inside it, `largest` is the most memory that a tensor has which an operator gave."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_nothing_of_a_maps_size_is_written():
    maps = ((8, 32, 32), (16, 16, 16))
    head, leaves = normed(maps=maps).train(), [x.requires_grad_() for x in inputs(maps=maps)]
    with Made() as made:
        torch.autograd.grad(head(leaves).sum(), [*leaves, *head.parameters()])
    assert made.largest < leaves[1].untyped_storage().nbytes()


# --- without a norm nothing has changed ----------------------------------------------------------------------------------------
def test_a_head_without_norm_is_as_it_was():
    head = FusedInterflowHead((4, 8), 5)
    assert list(head.state_dict()) == ["weight", "bias", "attention_weight"]
    assert head.norm is None and not list(head.children())
    assert "norm" not in repr(head) and "branch_loss" not in repr(head)
    assert called(lambda: head(inputs(maps=((4, 3, 3), (8, 2, 2))))) == ["interflow_head"]


def test_names_of_the_norm():
    head = FusedInterflowHead((4, 8), 5, norm="batch")
    own = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert list(head.state_dict()) == ["weight", "bias", "attention_weight", *own]
    assert head.norm.num_features == 12
    assert InterflowHead(**head._config()).norm is not None


# --- conversions ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_conversions_keep_the_norm_and_its_statistics(attention):
    head, maps = normed(attention).train(), inputs()
    eager = head.to_eager()
    back = FusedInterflowHead.from_eager(eager)
    for name, tensor in head.state_dict(keep_vars=True).items():
        assert eager.state_dict(keep_vars=True)[name] is tensor and back.state_dict(keep_vars=True)[name] is tensor
    before = head.norm.running_mean.clone()
    eager(maps)
    assert not torch.equal(before, head.norm.running_mean)
    assert_close("running", back.norm.running_mean, head.norm.running_mean)
    assert_close("eval", back.eval()(maps), eager.eval()(maps), 1e-5)


def test_copies():
    head, maps = normed().eval(), inputs()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(other(maps), head(maps))
        assert other.norm.running_mean is not head.norm.running_mean


def test_meta_device_and_starting_values():
    head = FusedInterflowHead((4, 8), 5, norm="batch", device="meta", dtype=torch.float64)
    assert {t.device.type for t in head.state_dict().values()} == {"meta"}
    head = head.to_empty(device="cpu")
    head.reset_parameters()
    assert torch.equal(head.norm.weight, torch.ones(12).double()) and torch.equal(head.norm.running_var, torch.ones(12).double())
    assert int(head.norm.num_batches_tracked) == 0


def test_synchronised():
    head, maps = normed().train(), inputs()
    other = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(head))
    assert isinstance(other.norm, nn.SyncBatchNorm)
    assert_close("training", other(maps), head(maps))
    assert_close("statistics", other.norm.running_var, head.norm.running_var)
    assert_close("eval", other.eval()(maps), head.eval()(maps))
    assert_close("folded", other.fold()(maps), head(maps), 1e-5)
    assert_close("eager", other.to_eager()(maps), head(maps), 1e-5)


# --- folding --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pool_size", [(1, 1), (2, 2)])
@pytest.mark.parametrize("attention", LINEAR)
def test_fold(attention, pool_size, bias):
    for kind in (FusedInterflowHead, InterflowHead):
        head, maps = normed(attention, kind, bias=bias, pool_size=pool_size).double(), inputs(dtype=torch.float64)
        before = copy.deepcopy(head.state_dict())
        folded = head.fold()
        assert_close("folded", folded(maps), head.eval()(maps), 1e-12)
        assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
        assert sorted(folded.state_dict()) == ["bias", "weight"]
        assert called(lambda folded=folded, maps=maps: folded(maps)) == (["interflow_head"] if kind is FusedInterflowHead else [])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_without_norm(attention, bias):
    for kind in (FusedInterflowHead, InterflowHead):
        head, maps = normed(attention, kind, bias=bias, branch_loss=0.3).double().train(), inputs(dtype=torch.float64)
        other = head.without_norm()
        assert type(other) is kind and other.norm is None and not other.training and other.branch_loss == 0.3
        assert head.training and head.norm is not None
        for name, got, want in zip(("y", "Z"), other.forward_branches(maps), head.eval().forward_branches(maps), strict=True):
            assert_close(name, got, want, 1e-12)


def test_without_norm_of_a_head_that_has_none_is_a_copy():
    head = FusedInterflowHead((4, 8), 5)
    other = head.without_norm()
    assert torch.equal(other.weight, head.weight) and other.weight is not head.weight


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(44, track_running_stats=False), nn.LayerNorm(44), nn.Identity()], ids=["no statistics", "layer", "identity"])
def test_what_cannot_be_folded_is_said(norm):
    head = normed()
    head.norm = norm
    head(inputs())
    for step in (head.fold, head.without_norm):
        with pytest.raises(ValueError, match=rf"^the head's norm must be a batch norm with running statistics to be folded, got {type(norm).__name__}"):
            step()


def test_affine_is_optional():
    head, maps = normed().double().eval(), inputs(dtype=torch.float64)
    head.norm = nn.BatchNorm1d(44, affine=False).double().eval()
    assert_close("folded", head.fold()(maps), head(maps), 1e-12)


# --- looking changes nothing -----------------------------------------------------------------------------------------------
def test_stage_weights_leave_the_statistics():
    head, maps = normed("gated").train(), inputs()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    weights = head.stage_weights(maps)
    assert head.training and head.norm.training
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())
    head.eval()
    y, z = head.forward_branches(maps)
    assert_close("y", (weights * z).sum(1), y, 1e-5)


# --- refusals -------------------------------------------------------------------------------------------------------------
def test_a_batch_of_one():
    head, maps = normed(), inputs(batch=1)
    with pytest.raises(ValueError, match=r"^features must have a batch of at least 2 for norm='batch' in training, .* got 1; eval\(\) takes 1$"):
        head(maps)
    assert head.eval()(maps).shape == (1, 10)
    assert torch.equal(head(inputs())[:1], head([x[:1] for x in inputs()]))  # in eval mode an image's bits are the same in every batch


@pytest.mark.parametrize("norm", ["layer", "", True, 3, nn.BatchNorm1d(4)])
def test_another_norm(norm):
    with pytest.raises(ValueError, match=r"^norm must be None or 'batch', got "):
        FusedInterflowHead((4, 8), 5, norm=norm)


# --- wiring ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("backend", "attention", "layout"),
    [("aot_eager", "nxn", "channels_last"), ("aot_eager", "gated", "contiguous"), pytest.param("inductor", "nxn", "contiguous", marks=pytest.mark.slow)],
)
def test_compile_fullgraph(backend, attention, layout):
    torch._dynamo.reset()
    head = normed(attention).train()
    other, maps = copy.deepcopy(head), inputs(layout=layout)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    for mode in (True, False):
        head.train(mode), other.train(mode)
        found = []
        for f, module in ((compiled, other), (head, head)):
            leaves = [in_layout(x.detach(), layout).requires_grad_() for x in maps]
            y = f(leaves)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), [*leaves, *module.parameters()])])
        for i, (got, want) in enumerate(zip(*found, strict=True)):
            assert_close(f"result {i}", got, want, 1e-5)
        assert_close("statistics", other.norm.running_mean, head.norm.running_mean)


def test_compiled_gradients_stay_views():
    torch._dynamo.reset()
    compiled, leaves = torch.compile(normed().train(), fullgraph=True, backend="aot_eager"), [x.requires_grad_() for x in inputs()]
    assert all(g.stride()[2:] == (0, 0) for g in torch.autograd.grad(compiled(leaves).sum(), leaves))


def test_export():
    head, maps = normed().eval(), inputs()
    program = torch.export.export(head, (maps,))
    assert torch.equal(program.module()(maps), head(maps))
    names = [str(node.target) for node in program.graph.nodes]
    assert sum("interflow_pool" in name for name in names) == 1 and sum("interflow_head" in name for name in names) == 1


def test_inference_mode_and_no_grad():
    head, maps = normed().eval(), inputs()
    want = head(maps).detach()
    with torch.inference_mode():
        assert torch.equal(head(maps), want)
    with torch.no_grad():
        assert torch.equal(head(maps), want)


def test_traced_by_fx():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = normed().eval()

        def forward(self, a, b, c):
            return self.head([a, b, c])

    net, maps = Net(), inputs()
    assert torch.equal(torch.fx.symbolic_trace(net)(*maps), net(*maps))
