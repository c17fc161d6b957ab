"""The operator's wiring: opcheck, gradcheck, torch.compile, autocast, torch.func, double backward, fakes."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from interflow_kernels import FusedInterflowHead, interflow_head
from interflow_kernels.testing import ATTENTIONS, HeadCase, assert_close, head_inputs

raw = torch.ops.interflow_kernels.interflow_head.default
raw_backward = torch.ops.interflow_kernels.interflow_head_backward.default
SMALL = ((4, 6, 5), (8, 3, 3))


def parameters(head):
    return head.weight, head.bias, head.attention_weight, head.attention_bias


def raw_arguments(case, need_branches=False, grad=True):
    head = case.head()
    if grad:
        head.requires_grad_(True)
    maps = [x.detach().requires_grad_(grad) for x in head_inputs(case)]
    return [maps, *parameters(head), case.attention, list(case.pool_size), need_branches, None]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_opcheck(attention, layout):
    for need_branches, pool_size in ((False, (1, 1)), (True, (2, 2))):
        case = HeadCase(batch=2, maps=SMALL, classes=5, attention=attention, layout=layout, pool_size=pool_size)
        torch.library.opcheck(raw, raw_arguments(case, need_branches))


def test_opcheck_folded():
    maps = head_inputs(HeadCase(batch=2, maps=SMALL))
    torch.library.opcheck(raw, [maps, torch.randn(5, 12), None, None, torch.randn(5), "folded", [1, 1], False, None])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_opcheck_backward(attention):
    case = HeadCase(batch=2, maps=SMALL, classes=5, attention=attention)
    head = case.head().requires_grad_(False)
    rest = [torch.randn(2, 12), *parameters(head), attention, [4, 8]]
    for dy, dz, stages, needs in (
        (torch.randn(2, 5), None, [0, 1], (True, True, True)),
        (None, torch.randn(2, 2, 5), [1], (True, False, True)),
        (torch.randn(2, 5), torch.randn(2, 2, 5), [], (False, True, False)),
    ):
        torch.library.opcheck(raw_backward, [dy, dz, *rest, stages, *needs], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("route", ["public", "raw"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_gradcheck(attention, route):
    case = HeadCase(batch=2, maps=((3, 4, 3), (2, 2, 2)), classes=3, attention=attention, dtype=torch.float64)
    maps, *given, _, _, _, _ = raw_arguments(case)
    given = [t if t is None else t.detach().requires_grad_(attention != "hard" or i < 2) for i, t in enumerate(given)]
    tensors = [t for t in given if t is not None]

    def run(*inputs):
        it = iter(inputs[2:])
        full = [None if t is None else next(it) for t in given]
        if route == "raw":
            return raw(list(inputs[:2]), *full, attention, [1, 1], True, None)[:2]
        return interflow_head(list(inputs[:2]), *full, attention=attention, return_branches=True)

    assert torch.autograd.gradcheck(run, (*maps, *tensors))


def test_gradcheck_of_the_folded_form():
    maps = [x.requires_grad_() for x in head_inputs(HeadCase(batch=2, maps=((3, 4, 3), (2, 2, 2)), dtype=torch.float64))]
    weight, bias, c = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (2, 3), (3,)))
    assert torch.autograd.gradcheck(lambda *t: raw(list(t[:2]), t[2], t[3], None, t[4], "folded", [1, 1], True, None)[:2], (*maps, weight, bias, c))


@pytest.mark.parametrize("pool_size", [(2, 2), (3, 1)])
def test_gradcheck_of_windows(pool_size):
    case = HeadCase(batch=2, maps=((3, 4, 3), (2, 5, 2)), classes=3, attention="1xn", dtype=torch.float64, pool_size=pool_size)
    head = FusedInterflowHead.from_eager(case.head())
    maps = [x.requires_grad_() for x in head_inputs(case)]
    assert torch.autograd.gradcheck(lambda *m: head(list(m)), tuple(maps))


# --- torch.compile ----------------------------------------------------------------------------------------------------
def all_gradients(f, head, maps):
    leaves = [x.detach().requires_grad_() for x in maps]
    tensors = [*leaves, *head.parameters()]
    y = f(leaves)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), tensors)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("backend", "attention"), [*(("aot_eager", a) for a in ATTENTIONS), ("inductor", "nxn")])
def test_compile_fullgraph(backend, attention, layout):
    torch._dynamo.reset()
    case = HeadCase(batch=2, maps=SMALL, classes=5, attention=attention, layout=layout)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    compiled = torch.compile(head, fullgraph=True, backend=backend)
    for got, want in zip(all_gradients(compiled, head, maps), all_gradients(head, head, maps), strict=True):
        assert_close("compiled", got, want)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("mode", ["inference_mode", "no_grad", "frozen"])
def test_compile_where_no_graph_is_built(mode, backend):
    """With grad mode on, nothing requires a gradient ("frozen")."""
    torch._dynamo.reset()
    case = HeadCase(batch=2, maps=SMALL, classes=5)
    head, maps = FusedInterflowHead.from_eager(case.head()).requires_grad_(False), [x.detach() for x in head_inputs(case)]
    for f in (head, head.fold(), lambda xs: head.forward_branches(xs)[1]):
        compiled = torch.compile(f, fullgraph=True, backend=backend)
        for given in (maps, [x.mean((2, 3)) for x in maps]):
            with {"inference_mode": torch.inference_mode, "no_grad": torch.no_grad, "frozen": torch.enable_grad}[mode]():
                assert torch.equal(compiled(given), f(given))
                with torch.autocast("cpu", torch.bfloat16):
                    assert compiled(given).dtype == torch.bfloat16 and torch.equal(compiled(given), f(given))


def test_compile_follows_the_batch_size():
    torch._dynamo.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    head = FusedInterflowHead.from_eager(HeadCase(maps=SMALL).head())
    compiled = torch.compile(head, fullgraph=True, backend=count)
    for batch in (2, 3, 5, 8, 13):
        maps = head_inputs(HeadCase(batch=batch, maps=SMALL))
        assert torch.equal(compiled(maps), head(maps))
    assert len(graphs) <= 2


def test_compiled_windows_and_branches():
    torch._dynamo.reset()
    case = HeadCase(batch=2, maps=SMALL, classes=5, pool_size=(2, 2))
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    both = torch.compile(lambda m: torch.cat([t.flatten() for t in head.forward_branches(m)]), fullgraph=True, backend="aot_eager")
    plain = lambda m: torch.cat([t.flatten() for t in head.forward_branches(m)])  # noqa: E731
    for got, want in zip(all_gradients(both, head, maps), all_gradients(plain, head, maps), strict=True):
        assert_close("compiled", got, want)


# --- autocast ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("route", ["public", "compiled", "raw"])
def test_autocast(route, dtype):
    torch._dynamo.reset()
    case = HeadCase(batch=2, maps=SMALL, classes=5)
    head = FusedInterflowHead.from_eager(case.head())
    maps = head_inputs(case)
    f = {
        "public": head,
        "compiled": torch.compile(head, fullgraph=True, backend="aot_eager"),
        "raw": lambda m: raw(m, *parameters(head), "nxn", [1, 1], False, None)[0],
    }[route]
    with torch.autocast("cpu", dtype=dtype):
        results = all_gradients(f, head, maps)
    assert results[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in results[1:])
    for got, want in zip(results, all_gradients(head, head, maps), strict=True):
        assert_close("autocast", got, want, 4e-2 if dtype == torch.bfloat16 else 5e-3)


def test_autocast_takes_each_feature_in_its_own_dtype_and_casts_none():
    case = HeadCase(batch=2, maps=((4, 40, 40), (8, 40, 40)), classes=5)
    head = FusedInterflowHead.from_eager(case.head())
    maps = [x.to(t).requires_grad_() for x, t in zip(head_inputs(case), (torch.bfloat16, torch.float32), strict=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.profiler.profile(record_shapes=True) as profile:
        y = head(maps)
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert maps[0].grad.dtype == torch.bfloat16
    assert maps[1].grad.dtype == torch.float32
    copies = [e.input_shapes for e in profile.events() if e.name in ("aten::_to_copy", "aten::copy_")]
    leaf_accumulation = [s for s in copies if s and s[0] in ([2, 4, 40, 40], [2, 8, 40, 40])]
    with torch.profiler.profile(record_shapes=True) as forward, torch.autocast("cpu", dtype=torch.bfloat16):
        head(maps)
    assert not [e for e in forward.events() if e.name in ("aten::_to_copy", "aten::copy_") and e.input_shapes and len(e.input_shapes[0]) == 4]
    assert len(leaf_accumulation) <= 2  # .grad of a leaf is materialised by autograd, nothing else


def test_autocast_leaves_fp64_alone():
    case = HeadCase(dtype=torch.float64)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(maps), head(maps))
        assert head(maps).dtype == torch.float64
        assert raw(maps, *parameters(head), "nxn", [1, 1], False, None)[0].dtype == torch.float64


# --- torch.func -------------------------------------------------------------------------------------------------------
@pytest.fixture
def small():
    case = HeadCase(batch=4, maps=SMALL, classes=5)
    return FusedInterflowHead.from_eager(case.head()), head_inputs(case)


def test_func_grad(small):
    head, maps = small
    leaf = maps[0].clone().requires_grad_()
    head([leaf, maps[1]]).square().sum().backward()
    got = torch.func.grad(lambda x: head([x, maps[1]]).square().sum())(maps[0])
    assert_close("grad", got, leaf.grad)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_vmap_over_features(attention):
    head = FusedInterflowHead.from_eager(HeadCase(maps=SMALL, attention=attention).head())
    stacked = [torch.stack([head_inputs(HeadCase(maps=SMALL), seed)[i] for seed in range(3)]) for i in range(2)]
    y, z = torch.vmap(lambda a, b: head.forward_branches([a, b]))(*stacked)
    shared = torch.vmap(lambda a: head([a, stacked[1][0]]))(stacked[0])
    for v in range(3):
        want = head.forward_branches([stacked[0][v], stacked[1][v]])
        assert torch.equal(y[v], want[0])
        assert torch.equal(z[v], want[1])
        assert torch.equal(shared[v], head([stacked[0][v], stacked[1][0]]))


def test_vmap_over_parameters(small):
    head, maps = small
    weights = torch.randn(3, *head.weight.shape)
    call = lambda w: interflow_head(maps, w, head.bias, head.attention_weight, head.attention_bias)  # noqa: E731
    got = torch.vmap(call)(weights)
    for v in range(3):
        assert torch.equal(got[v], call(weights[v]))


def test_per_sample_gradients(small):
    head, maps = small

    def loss(weight, a, b):
        return interflow_head([a[None], b[None]], weight, head.bias, head.attention_weight, head.attention_bias).square().sum()

    got = torch.vmap(torch.func.grad(loss), (None, 0, 0))(head.weight, *maps)
    for v in range(4):
        assert_close("per sample", got[v], torch.func.grad(loss)(head.weight, maps[0][v], maps[1][v]))


def test_jvp_raises(small):
    head, maps = small
    with pytest.raises((NotImplementedError, RuntimeError), match="jvp|forward"):
        torch.func.jvp(lambda x: head([x, maps[1]]), (maps[0],), (torch.ones_like(maps[0]),))


# --- double backward --------------------------------------------------------------------------------------------------
def test_double_backward_raises_by_every_road(small):
    head, maps = small
    one = lambda f: lambda x: f([x, maps[1]]).square().sum()  # noqa: E731
    by_raw = lambda m: raw(m, *parameters(head), "nxn", [1, 1], False, None)[0]  # noqa: E731
    for f in (head, by_raw):
        leaf = maps[0].clone().requires_grad_()
        (g,) = torch.autograd.grad(one(f)(leaf), leaf, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            torch.autograd.grad(g.square().sum(), head.weight)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.func.grad(lambda x: torch.func.grad(one(head))(x).sum())(maps[0])
    torch._dynamo.reset()
    compiled = torch.compile(head, backend="aot_eager")
    leaf = maps[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(one(compiled)(leaf), leaf, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match="double backward"):
        torch.autograd.grad(g.square().sum(), head.weight)


# --- fakes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("need_branches", [False, True])
def test_fakes_tell_what_the_kernels_return(dtype, need_branches):
    for layout in ("contiguous", "channels_last", "cropped"):
        case = HeadCase(dtype=dtype, layout=layout)
        arguments = raw_arguments(case, need_branches, grad=False)
        real = raw(*arguments)
        with FakeTensorMode() as mode:
            convert = lambda t: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t  # noqa: E731
            fake = raw([convert(x) for x in arguments[0]], *map(convert, arguments[1:]))
        for r, f in zip(real, fake, strict=True):
            assert (r.shape, r.stride(), r.dtype) == (f.shape, f.stride(), f.dtype)


def test_meta_device():
    head = FusedInterflowHead((4, 8), 5, device="meta")
    y, z = head.forward_branches([torch.empty(2, 4, 6, 5, device="meta"), torch.empty(2, 8, 3, 3, device="meta")])
    assert (y.shape, z.shape, y.device.type) == ((2, 5), (2, 2, 5), "meta")
