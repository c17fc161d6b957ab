"""The stage end's wiring: opcheck, gradcheck, torch.compile, autocast, torch.func, double backward, fakes, what is saved."""

import gc
import weakref

import pytest
import torch
from stage_end_cases import ACTIVATIONS, raw_end, raw_end_backward, run, upstreams
from test_stage_tap_memory import SavedBytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from interflow_kernels import StageEnd, reference, stage_end
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import LAYOUTS, TOLERANCE, EndCase, assert_close, assert_same_bits, end_inputs, in_layout

BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def leaves(case, seed=0):
    return [None if t is None else t.detach().requires_grad_() for t in end_inputs(case, seed)]


# --- opcheck, gradcheck ----------------------------------------------------------------------------------------------------
@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", pytest.param("sliced", marks=pytest.mark.slow), "permuted"])
def test_opcheck(layout, activation):
    for dtype, shift, residual in ((torch.float32, "fp32", layout), (torch.bfloat16, "none", "none"), (torch.float64, "own", "contiguous")):
        tensors = leaves(EndCase((2, 5, 5, 6), dtype, layout, shift=shift, residual=residual))
        torch.library.opcheck(raw_end, [*tensors, activation])


@ACTIVATIONS
@BOTH
def test_opcheck_backward(layout, activation):
    inputs = end_inputs(EndCase((2, 5, 5, 6), layout=layout))
    v, p = raw_end(*inputs, activation)
    for dv, dp, need_shift in ((torch.randn_like(v), torch.randn_like(p), True), (torch.randn_like(v), None, False), (None, torch.randn(5, 2).t(), True)):
        arguments = [dv, dp, v if activation == "relu" else None, inputs[0], layout == "channels_last", need_shift]
        torch.library.opcheck(raw_end_backward, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("route", ["public", "raw"])
def test_gradcheck(route, layout, activation):
    call = (lambda *t: stage_end(*t, activation=activation)) if route == "public" else (lambda *t: raw_end(*t, activation))
    for shape in ((2, 3, 4, 5), (1, 2, 1, 3)):
        count = torch.tensor(shape).prod()
        u = (torch.randperm(int(count), generator=torch.Generator().manual_seed(0)).double() / 20 - count / 40 + 0.02).reshape(shape)
        u = in_layout(u, layout).detach().requires_grad_()
        shift, residual = (torch.zeros(s, dtype=torch.float64, requires_grad=True) for s in (shape[1], shape))
        assert torch.autograd.gradcheck(call, (u, shift, residual))
        assert torch.autograd.gradcheck(lambda u: call(u, None, None), (u,))


@ACTIVATIONS
@BOTH
def test_both_roads_are_the_same_to_the_bit(layout, activation):
    for use in ((0,), (1,), (0, 1)):
        results = []
        for call in (lambda *t: stage_end(*t, activation=activation), lambda *t: raw_end(*t, activation)):
            tensors = leaves(EndCase(layout=layout))
            outputs = [t for i, t in enumerate(call(*tensors)) if i in use]
            results.append([*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], tensors)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


# --- torch.compile -----------------------------------------------------------------------------------------------------------
def forward_and_backward(f, tensors):
    """Every output and gradient, as f's own tensors."""
    tensors = [t.detach().requires_grad_() for t in tensors]
    outputs = f(*tensors)
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, weights)]


@ACTIVATIONS
@BOTH
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(compiler, layout, activation):
    torch._dynamo.reset()
    module = StageEnd(activation)
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for dtype in (torch.float32, torch.bfloat16) if compiler == "aot_eager" else (torch.float32,):
        inputs = end_inputs(EndCase((2, 12, 7, 6), dtype, layout, residual=layout))
        for got, want in zip(forward_and_backward(compiled, inputs), forward_and_backward(module, inputs), strict=True):
            assert torch.equal(got, want) and got.stride() == want.stride()
        with torch.no_grad():
            for got, want in zip(compiled(*inputs), module(*inputs), strict=True):
                assert torch.equal(got, want) and got.stride() == want.stride()


def test_compile_inside_a_network():
    """Between convolutions, where the compiler chooses strides of its own; the map goes on and comes back as a shortcut."""
    torch._dynamo.reset()
    first, last, end = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), StageEnd()

    def network(x):
        u, p = end(first(x))
        v, q = end(last(u), None, u)
        return v.mean((2, 3)) + p - q

    compiled = torch.compile(network, fullgraph=True, backend="inductor")
    for layout in ("contiguous", "channels_last"):
        x = in_layout(torch.randn(2, 3, 9, 10), layout)
        results = []
        for f in (compiled, network):
            y = f(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [*first.parameters(), *last.parameters()])])
        for got, want in zip(*results, strict=True):
            assert_close("compiled", got, want, 1e-5)


@BOTH
def test_compile_follows_the_sizes(layout):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(StageEnd(), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for batch in (2, 3, 5, 8, 13):
        inputs = end_inputs(EndCase((batch, 5, 6, 7), layout=layout))
        for got, want in zip(compiled(*inputs), stage_end(*inputs), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) <= 2
    torch._dynamo.reset()
    compiled = torch.compile(StageEnd(), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 6, 7), (3, 9, 7, 12)):
        inputs = end_inputs(EndCase(shape))
        for got, want in zip(forward_and_backward(compiled, inputs), forward_and_backward(stage_end, inputs), strict=True):
            assert torch.equal(got, want)


# --- recorders ---------------------------------------------------------------------------------------------------------------
class Block(nn.Module):
    """A convolution with a shortcut around it."""

    def __init__(self):
        super().__init__()
        self.conv, self.end = nn.Conv2d(4, 4, 3, padding=1), StageEnd()

    def forward(self, x):
        v, p = self.end(self.conv(x), None, x)
        return v.sum((2, 3)) + p


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_recorders():
    block, x = Block(), torch.randn(2, 4, 6, 5)
    traced, exported, drawn = torch.jit.trace(block, x), torch.export.export(block, (x,)).module(), torch.fx.symbolic_trace(block)
    assert "interflow_kernels::stage_end" in str(traced.inlined_graph)
    assert [node.target for node in drawn.graph.nodes if node.op == "call_module"] == ["conv", "end"]
    for recorded in (traced, exported, drawn):
        y, want = recorded(x), block(x)
        assert torch.equal(y, want)
        for a, b in zip(*(torch.autograd.grad(t.square().sum(), block.parameters(), allow_unused=True) for t in (y, want)), strict=True):
            if recorded is not exported:  # which has parameters of its own
                assert torch.equal(a, b)
    with pytest.raises(NotImplementedError, match="torch.jit.script cannot compile StageEnd"):
        torch.jit.script(StageEnd())


# --- autocast ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ["public", "compiled", "raw"])
@BOTH
def test_autocast_casts_nothing(layout, route):
    torch._dynamo.reset()
    conv, x = nn.Conv2d(3, 8, 3), in_layout(torch.randn(2, 3, 9, 8), layout)
    end = {"public": stage_end, "compiled": torch.compile(stage_end, fullgraph=True, backend="aot_eager"), "raw": lambda u, s, r: raw_end(u, s, r, "relu")}[
        route
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = conv._conv_forward(x, conv.weight, None)
        v, p = end(u, conv.bias, u.detach())
    assert (u.dtype, v.dtype, p.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want, mean = reference.stage_end(u, conv.bias, u.detach(), "relu")
    assert_same_bits("v", v, want)
    assert_close("p", p, mean)
    got = torch.autograd.grad([v.float().sum(), p.sum()], [u, conv.bias, conv.weight], retain_graph=True)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    expected = torch.autograd.grad([want.float().sum(), mean.sum()], [u, conv.bias, conv.weight])
    for name, a, b in zip(("du", "dshift", "weight"), got, expected, strict=True):
        assert_close(name, a, b, 2e-2)


# --- torch.func ----------------------------------------------------------------------------------------------------------------
def loss(*tensors, activation="relu"):
    v, p = stage_end(*tensors, activation=activation)
    return p.square().sum() + v.pow(3).sum()


def looped_gradients(calls, activation="relu"):
    results = []
    for tensors in calls:
        tensors = [t.detach().requires_grad_() for t in tensors]
        results.append(torch.autograd.grad(loss(*tensors, activation=activation), tensors))
    return [torch.stack(each) for each in zip(*results, strict=True)]


@ACTIVATIONS
@BOTH
def test_func_grad(layout, activation):
    inputs = end_inputs(EndCase(layout=layout))
    got = torch.func.grad(lambda *t: loss(*t, activation=activation), (0, 1, 2))(*inputs)
    for a, b in zip(got, looped_gradients([inputs], activation), strict=True):
        assert torch.equal(a, b[0])


@ACTIVATIONS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("mapped", [0, 1, 4])
def test_vmap_and_gradients_of_each_slice(mapped, layout, activation):
    for shape in ((2, 9, 5, 6), (2, 9, 1, 1)):
        calls = [end_inputs(EndCase(shape, layout=layout, residual=layout), seed) for seed in range(3)]
        us, rs = (torch.stack([call[i] for call in calls], mapped) for i in (0, 2))
        calls = list(zip(us.unbind(mapped), [c[1] for c in calls], rs.unbind(mapped), strict=True))  # whose strides are the slices' own
        shifts = torch.stack([call[1] for call in calls], 1)
        u, shift, residual = calls[0]
        f = lambda *t: stage_end(*t, activation=activation)  # noqa: E731
        for dims, arguments, each in (
            ((mapped, None, None), (us, shift, residual), [(c[0], shift, residual) for c in calls]),
            ((mapped, None, mapped), (us, shift, rs), [(c[0], shift, c[2]) for c in calls]),
            ((None, 1, None), (u, shifts, residual), [(u, c[1], residual) for c in calls]),
            ((None, None, mapped), (u, shift, rs), [(u, shift, c[2]) for c in calls]),
            ((mapped, 1, mapped), (us, shifts, rs), calls),
        ):
            got = torch.vmap(f, dims)(*arguments)
            for v, call in enumerate(each):
                for a, b in zip(got, f(*call), strict=True):
                    assert torch.equal(a[v], b)
            grads = torch.vmap(torch.func.grad(lambda *t: loss(*t, activation=activation), (0, 1, 2)), dims)(*arguments)
            for a, b in zip(grads, looped_gradients(each, activation), strict=True):
                assert torch.equal(a, b)


def test_jvp_raises():
    u, shift, _ = end_inputs(EndCase())
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        torch.func.jvp(lambda u: stage_end(u, shift), (u,), (torch.ones_like(u),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        stage_end(torch.autograd.forward_ad.make_dual(u, torch.ones_like(u)), shift)


# --- double backward -------------------------------------------------------------------------------------------------------------
@ACTIVATIONS
def test_double_backward_raises_by_every_road(activation):
    torch._dynamo.reset()
    compiled = torch.compile(stage_end, backend="aot_eager")
    for f in (
        lambda *t: stage_end(*t, activation=activation),
        lambda *t: raw_end(*t, activation),
        lambda *t: compiled(*t, activation=activation),
    ):
        tensors = leaves(EndCase())
        grads = torch.autograd.grad(sum(t.square().sum() for t in f(*tensors)), tensors, create_graph=True)
        for g in grads:
            with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
                torch.autograd.grad(g.square().sum(), tensors[0], retain_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.func.grad(lambda u: torch.func.grad(lambda x: loss(x, activation=activation))(u).sum())(torch.randn(1, 2, 3, 3))
    u = torch.randn(1, 2, 3, 3, requires_grad=True)  # constants upstream: du depends on u through relu alone
    (du,) = torch.autograd.grad(stage_end(u, activation=activation), u, (torch.ones(1, 2, 3, 3), torch.ones(1, 2)), create_graph=True)
    assert du.requires_grad == (activation == "relu")
    if activation == "relu":
        with pytest.raises(NotImplementedError, match="double backward"):
            torch.autograd.grad(du.sum(), u)


# --- fakes -------------------------------------------------------------------------------------------------------------------------
@ACTIVATIONS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_tell_what_the_kernels_return(layout, dtype, activation):
    for shape in ((2, 19, 9, 13), (2, 5, 1, 6), (3, 1, 4, 4), (2, 7, 1, 1), (1, 8, 6, 1), (0, 5, 4, 6)):
        if shape[0] == 0 and layout == "expanded":
            continue
        for shift, residual in (("fp32", "contiguous"), ("none", "none")):
            u, s, r = end_inputs(EndCase(shape, dtype, layout, shift=shift, residual=residual))
            v, p = raw_end(u, s, r, activation)
            backward = (v, p, v if activation == "relu" else None, u, is_channels_last(u), s is not None)
            real = [v, p, *raw_end_backward(*backward)]
            with FakeTensorMode() as mode:
                convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
                fake = [*raw_end(*map(convert, (u, s, r)), activation), *raw_end_backward(*map(convert, backward))]
            for each, of_fake in zip(real, fake, strict=True):
                assert (each.shape, each.stride(), each.dtype) == (of_fake.shape, of_fake.stride(), of_fake.dtype)


def test_meta_device():
    u, shift = torch.empty(2, 4, 7, 5, device="meta", requires_grad=True), torch.empty(4, device="meta", requires_grad=True)
    v, p = stage_end(u, shift, torch.empty(2, 4, 7, 5, device="meta"))
    assert (v.shape, p.shape, v.device.type) == ((2, 4, 7, 5), (2, 4), "meta")
    (v.sum() + p.sum()).backward()
    assert (u.grad.shape, shift.grad.shape) == (u.shape, shift.shape)


# --- memory --------------------------------------------------------------------------------------------------------------------
@ACTIVATIONS
@BOTH
def test_nothing_is_saved_beside_v(layout, activation):
    for dtype in (torch.float32, torch.bfloat16):
        with SavedBytes() as saved:
            v, p = stage_end(*leaves(EndCase(dtype=dtype, layout=layout)), activation=activation)
        assert len(saved.storages) == (activation == "relu")
        assert saved.total(without=[v]) == 0
        (v.float().sum() + p.sum()).backward()


def test_u_and_the_residual_can_be_freed():
    tensors = [t * 1 for t in leaves(EndCase())]
    gone = [weakref.ref(t) for t in tensors]
    v, p = stage_end(*tensors)
    del tensors
    gc.collect()
    assert [r() for r in gone] == [None] * 3
    (v.sum() + p.sum()).backward()


def test_backward_allocates_nothing_beside_du():
    for layout in ("contiguous", "channels_last"):
        u, residual = (in_layout(torch.randn(2, 64, 64, 64), layout).requires_grad_() for _ in range(2))
        v, p = stage_end(u, torch.randn(64, requires_grad=True), residual)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.autograd.grad([v, p], [u, residual], [v.detach(), p.detach()])
        sizes = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > u.nbytes / 50]
        assert sum(sizes) <= u.nbytes + 4096, sizes


def test_v_must_not_be_changed_in_place():
    u = torch.randn(1, 2, 3, 3, requires_grad=True)
    v, _ = stage_end(u * 1)
    v += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        v.sum().backward()
    v, p = stage_end(u * 1, activation="none")  # which keeps nothing
    v += 1
    (v.sum() + p.sum()).backward()
    assert run(u, None, None, "none", *upstreams((1, 2, 3, 3), torch.float32))[2].isfinite().all()
