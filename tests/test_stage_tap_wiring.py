"""The stage tap's wiring: opcheck, gradcheck, torch.compile, autocast, torch.func, double backward, fakes."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from interflow_kernels import StageTap, conv_tap, reference, stage_tap
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import LAYOUTS, TOLERANCE, TapCase, assert_close, assert_same_bits, in_layout, tap_inputs

raw = torch.ops.interflow_kernels.stage_tap.default
raw_backward = torch.ops.interflow_kernels.stage_tap_backward.default
FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])
BOTH = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def leaves(case, seed=0):
    return [None if t is None else t.detach().requires_grad_() for t in tap_inputs(case, seed)]


def distinct(case):
    """u and shift whose sums keep away from 0 and from each other, so that finite differences hold."""
    generator = torch.Generator().manual_seed(0)
    count = torch.tensor(case.shape).prod()
    u = (torch.randperm(int(count), generator=generator).double() / 20 - count / 40 + 0.02).reshape(case.shape)
    u = in_layout(u if case.layout != "expanded" else u[:1].expand(case.shape), case.layout)
    return u.detach().requires_grad_(), torch.zeros(case.shape[1], dtype=torch.float64, requires_grad=True)


# --- opcheck, gradcheck ----------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_opcheck(layout, max_pool):
    for dtype, shift, need_mask in ((torch.float32, "fp32", True), (torch.bfloat16, "none", True), (torch.float64, "own", False)):
        u, s = leaves(TapCase((2, 5, 5, 6), dtype, layout, shift=shift))
        if not need_mask:
            u, s = u.detach(), s.detach()
        torch.library.opcheck(raw, [u, s, max_pool, need_mask])


@FORMS
@BOTH
def test_opcheck_backward(layout, max_pool):
    u, shift = tap_inputs(TapCase((2, 5, 5, 6), layout=layout))
    m, p, mask = raw(u, shift, max_pool, True)
    dm = torch.randn_like(m) if max_pool else None
    for up, down, need_shift in ((dm, torch.randn_like(p), True), (dm, None, False), (None, torch.randn_like(p).t().contiguous().t(), True)):
        arguments = [up, down, mask, u, max_pool, layout == "channels_last", need_shift]
        torch.library.opcheck(raw_backward, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("route", ["public", "raw"])
def test_gradcheck(route, layout, max_pool):
    for shape in ((2, 3, 4, 5), (1, 2, 1, 3)):
        u, shift = distinct(TapCase(shape, torch.float64, layout))

        def call(u, shift):
            m, p = stage_tap(u, shift, max_pool=max_pool) if route == "public" else raw(u, shift, max_pool, True)[:2]
            return (m, p) if max_pool else p

        assert torch.autograd.gradcheck(call, (u, shift))
        assert torch.autograd.gradcheck(lambda u: call(u, None), (u,))


@FORMS
@BOTH
def test_both_roads_are_the_same_to_the_bit(layout, max_pool):
    for use in ((0,), (1,), (0, 1)):
        results = []
        for call in (lambda u, s: stage_tap(u, s, max_pool=max_pool), lambda u, s: raw(u, s, max_pool, True)[:2]):
            tensors = leaves(TapCase(layout=layout, max_pool=max_pool))
            outputs = [t for i, t in enumerate(call(*tensors)) if i in use and t is not None and t.numel()]
            if outputs:
                results.append([*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], tensors)])
        for a, b in zip(*results, strict=True) if results else ():
            assert torch.equal(a, b)


def test_raw_call_without_a_mask_cannot_be_differentiated():
    u, shift = leaves(TapCase())
    p = raw(u, shift, True, False)[1]
    with pytest.raises(RuntimeError, match="need_mask=False.*need_mask=True"):
        p.sum().backward()


# --- torch.compile -----------------------------------------------------------------------------------------------------------
def forward_and_backward(f, u, shift):
    """Every output and gradient, as f's own tensors."""
    tensors = [u.detach().requires_grad_(), shift.detach().requires_grad_()]
    outputs = [t for t in f(*tensors) if t is not None]
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, tensors, weights)]


@FORMS
@BOTH
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler, layout, max_pool):
    torch._dynamo.reset()
    tap = StageTap(max_pool)
    compiled = torch.compile(tap, fullgraph=True, backend=compiler)
    for dtype in (torch.float32, torch.bfloat16) if compiler == "aot_eager" else (torch.float32,):
        u, shift = tap_inputs(TapCase((2, 12, 7, 6), dtype, layout))
        for got, want in zip(forward_and_backward(compiled, u, shift), forward_and_backward(tap, u, shift), strict=True):
            assert torch.equal(got, want)
            assert got.stride() == want.stride()
        with torch.no_grad():
            for got, want in zip(compiled(u, shift), tap(u, shift), strict=True):
                assert (got is None and want is None) or (torch.equal(got, want) and got.stride() == want.stride())


def test_compile_inside_a_network():
    """Between convolutions, where the compiler chooses strides of its own."""
    torch._dynamo.reset()
    first, last, tap = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), StageTap()

    def network(x):
        m, p = conv_tap(first, tap, x)
        return last(m).mean((2, 3)) + p[:, :4]

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
def test_compile_follows_the_batch_size(layout):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(StageTap(), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for batch in (2, 3, 5, 8, 13):
        u, shift = tap_inputs(TapCase((batch, 5, 6, 7), layout=layout))
        for got, want in zip(compiled(u, shift), stage_tap(u, shift), strict=True):
            assert torch.equal(got, want)
    assert len(graphs) <= 2


def test_compiled_sizes_may_be_dynamic():
    torch._dynamo.reset()
    compiled = torch.compile(StageTap(), fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 5, 6, 7), (3, 9, 7, 12), (4, 6, 11, 10)):
        u, shift = tap_inputs(TapCase(shape))
        for got, want in zip(forward_and_backward(compiled, u, shift), forward_and_backward(stage_tap, u, shift), strict=True):
            assert torch.equal(got, want)


# --- autocast ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("route", ["public", "compiled", "raw"])
@BOTH
def test_autocast_casts_nothing(layout, route):
    torch._dynamo.reset()
    conv, x = nn.Conv2d(3, 8, 3), in_layout(torch.randn(2, 3, 9, 8), layout)
    tap = {"public": stage_tap, "compiled": torch.compile(stage_tap, fullgraph=True, backend="aot_eager"), "raw": lambda u, s: raw(u, s, True, True)[:2]}[route]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = conv._conv_forward(x, conv.weight, None)
        m, p = tap(u, conv.bias)
    assert (u.dtype, m.dtype, p.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    want, mean = reference.stage_tap(u, conv.bias, True)
    assert_same_bits("m", m, want)
    assert_close("p", p, mean)
    got = torch.autograd.grad([m.float().sum(), p.sum()], [u, conv.bias, conv.weight], retain_graph=True)
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    expected = torch.autograd.grad([want.float().sum(), mean.sum()], [u, conv.bias, conv.weight])
    for name, a, b in zip(("du", "dshift", "weight"), got, expected, strict=True):
        assert_close(name, a, b, 2e-2)
    for other in (torch.float32, torch.float64):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            m, p = tap(torch.randn(1, 2, 4, 4, dtype=other), torch.zeros(2))
        assert (m.dtype, p.dtype) == (other, other)


# --- torch.func ----------------------------------------------------------------------------------------------------------------
def loss(u, shift, max_pool=True):
    m, p = stage_tap(u, shift, max_pool=max_pool)
    return p.square().sum() + (m.pow(3).sum() if m is not None else 0)


def looped_gradients(us, shifts, max_pool=True):
    results = []
    for u, shift in zip(us, shifts, strict=True):
        u, shift = u.detach().requires_grad_(), shift.detach().requires_grad_()
        results.append(torch.autograd.grad(loss(u, shift, max_pool), (u, shift)))
    return [torch.stack(each) for each in zip(*results, strict=True)]


@FORMS
@BOTH
def test_func_grad(layout, max_pool):
    u, shift = tap_inputs(TapCase(layout=layout))
    got = torch.func.grad(lambda u, s: loss(u, s, max_pool), (0, 1))(u, shift)
    for a, b in zip(got, looped_gradients([u], [shift], max_pool), strict=True):
        assert torch.equal(a, b[0])


@FORMS
@BOTH
@pytest.mark.parametrize("mapped", [0, 1, 4])
def test_vmap(mapped, layout, max_pool):
    maps = [tap_inputs(TapCase((2, 9, 5, 6), layout=layout), seed) for seed in range(3)]
    us, shifts = torch.stack([u for u, _ in maps], mapped), torch.stack([s for _, s in maps], 1)
    one = lambda u, s: tuple(t for t in stage_tap(u, s, max_pool=max_pool) if t is not None)  # noqa: E731
    u, shift = maps[0]
    for f, dims, arguments, calls in (
        (lambda u: one(u, shift), mapped, (us,), [(each, shift) for each, _ in maps]),
        (lambda s: one(u, s), 1, (shifts,), [(u, each) for _, each in maps]),
        (one, (mapped, 1), (us, shifts), maps),
    ):
        got = torch.vmap(f, dims)(*arguments)
        for v, call in enumerate(calls):
            for a, b in zip(got, one(*call), strict=True):
                assert torch.equal(a[v], b)


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mapped", [0, 1, 2, 4])
def test_gradient_of_each_slice(mapped, layout, max_pool):
    """vmap(grad): the slices' memory format decides the mask's, also where they do not lie one behind the other."""
    for shape in ((2, 9, 5, 6), (2, 9, 1, 1), (1, 9, 4, 4)):
        us = [tap_inputs(TapCase(shape, layout=layout), seed)[0] for seed in range(3)]
        together = torch.stack(us, mapped)
        shifts = torch.randn(3, 9)
        expected = looped_gradients(together.unbind(mapped), shifts, max_pool)
        got = torch.vmap(torch.func.grad(lambda u, s: loss(u, s, max_pool), (0, 1)), (mapped, 0))(together, shifts)
        alone = torch.vmap(torch.func.grad(lambda u, s=shifts[0]: loss(u, s, max_pool)), mapped)(together)
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(alone, looped_gradients(together.unbind(mapped), shifts[:1].expand(3, -1), max_pool)[0])


@FORMS
def test_gradient_of_interleaved_channels_last_slices(max_pool):
    """Slices of [B, V, H, W, C] are channels_last, but no view holds them all as one batch."""
    nhwc = torch.randn(2, 3, 5, 4, 9)
    together = nhwc.permute(0, 1, 4, 2, 3)  # [B, V, C, H, W]
    assert together[:, 0].stride(1) == 1
    shift = torch.randn(9)
    got = torch.vmap(torch.func.grad(lambda u: loss(u, shift, max_pool)), 1)(together)
    expected = looped_gradients(together.unbind(1), [shift] * 3, max_pool)[0]
    assert torch.equal(got, expected)
    tall = torch.randn(9, 3, 2).permute(2, 1, 0)[..., None, None]  # [B, V, C, 1, 1], no stride of a slice's channels is 1
    got = torch.vmap(torch.func.grad(lambda u: loss(u, shift, max_pool)), 1)(tall)
    assert torch.equal(got, looped_gradients(tall.unbind(1), [shift] * 3, max_pool)[0])


class Stage(nn.Module):
    """A convolution and its tap."""

    def __init__(self):
        super().__init__()
        self.conv, self.tap = nn.Conv2d(3, 4, 3), StageTap()

    def forward(self, x):
        return conv_tap(self.conv, self.tap, x)


def test_per_sample_gradients_of_a_network():
    stage = Stage()
    parameters, x = dict(stage.named_parameters()), torch.randn(5, 3, 8, 7)

    def of(parameters, x):
        m, p = torch.func.functional_call(stage, parameters, (x[None],))
        return m.square().sum() + p.sum()

    got = torch.vmap(torch.func.grad(of), (None, 0))(parameters, x)
    for v in range(5):
        for name, g in torch.func.grad(of)(parameters, x[v]).items():
            assert_close(name, got[name][v], g, 1e-5)


def test_jvp_raises():
    u, shift = tap_inputs(TapCase())
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        torch.func.jvp(lambda u: stage_tap(u, shift), (u,), (torch.ones_like(u),))
    with torch.autograd.forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        stage_tap(torch.autograd.forward_ad.make_dual(u, torch.ones_like(u)), shift)


# --- double backward -------------------------------------------------------------------------------------------------------------
@FORMS
def test_double_backward_raises_by_every_road(max_pool):
    torch._dynamo.reset()
    compiled = torch.compile(stage_tap, backend="aot_eager")
    for f in (lambda u, s: stage_tap(u, s, max_pool=max_pool), lambda u, s: raw(u, s, max_pool, True)[:2], lambda u, s: compiled(u, s, max_pool=max_pool)):
        u, shift = leaves(TapCase())
        outputs = [t for t in f(u, shift) if t is not None and t.numel()]
        grads = torch.autograd.grad(sum(t.square().sum() for t in outputs), (u, shift), create_graph=True)
        for g in grads:
            with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
                torch.autograd.grad(g.square().sum(), u, retain_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.func.grad(lambda u: torch.func.grad(lambda x: loss(x, None, max_pool))(u).sum())(u.detach())


# --- fakes -------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fakes_tell_what_the_kernels_return(layout, dtype):
    for shape in ((2, 19, 9, 13), (2, 5, 1, 6), (3, 1, 4, 4), (2, 7, 1, 1), (1, 8, 6, 1), (0, 5, 4, 6)):
        if shape[0] == 0 and layout == "expanded":
            continue
        u, shift = tap_inputs(TapCase(shape, dtype, layout))
        for max_pool, need_mask, s in ((True, True, shift), (False, True, None), (True, False, shift), (False, False, shift)):
            m, p, mask = real = raw(u, s, max_pool, need_mask)
            backward = [(m if max_pool else None, p, mask, u, max_pool, is_channels_last(u), s is not None)] if need_mask else []
            real = [*real, *(t for arguments in backward for t in raw_backward(*arguments))]
            with FakeTensorMode() as mode:
                convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
                fake = [*raw(convert(u), convert(s), max_pool, need_mask)]
                fake += [t for arguments in backward for t in raw_backward(*map(convert, arguments))]
            for r, f in zip(real, fake, strict=True):
                assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


@FORMS
def test_meta_device(max_pool):
    u, shift = torch.empty(2, 4, 7, 5, device="meta", requires_grad=True), torch.empty(4, device="meta", requires_grad=True)
    m, p = stage_tap(u, shift, max_pool=max_pool)
    assert (p.shape, p.device.type) == ((2, 4), "meta")
    assert m is None or (m.shape, m.device.type) == ((2, 4, 3, 2), "meta")
    p.sum().backward()
    assert (u.grad.shape, shift.grad.shape) == (u.shape, shift.shape)
