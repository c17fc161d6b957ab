"""torch.func under torch.compile: the values are those of the same transform uncompiled, and of the plain PyTorch head and tap."""

import pytest
import torch
from torch import func

from interflow_kernels import FusedInterflowHead, backend, interflow_head, stage_tap
from interflow_kernels.testing import ATTENTIONS, HeadCase, assert_close, head_inputs

MAPS = ((2, 3, 2), (3, 2, 2))
TOLERANCE = 2e-6

# --- the transforms, each of a smooth f from a tensor to a tensor ------------------------------------------------------------
REVERSE = {
    "grad": lambda f: func.grad(lambda x: f(x).sin().sum()),
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    "jacrev": lambda f: func.jacrev(f),
    "vmap": lambda f: lambda x: torch.vmap(f)(torch.stack([x, 2 * x])),
    "vmap(grad)": lambda f: lambda x: torch.vmap(func.grad(lambda x: f(x).sin().sum()))(torch.stack([x, 2 * x])),
    "grad(vmap)": lambda f: func.grad(lambda x: torch.vmap(f)(torch.stack([x, 2 * x])).sin().sum()),
}
# The fused head and tap refuse these in a sentence; compiled, the second derivative works.
TWICE = {"grad(grad)": lambda f: func.grad(lambda x: func.grad(lambda x: f(x).sin().sum())(x).square().sum())}
FORWARD = {
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "jacfwd": lambda f: func.jacfwd(f),
    "hessian": lambda f: func.hessian(lambda x: f(x).sin().sum()),
    "vmap(jvp)": lambda f: lambda x: torch.vmap(lambda x: func.jvp(f, (x,), (torch.ones_like(x),))[1])(torch.stack([x, 2 * x])),
}
TRANSFORMS = REVERSE | TWICE


def heads(attention):
    """The fused head, with nothing that requires a gradient, and its plain twin, with other stages than the differentiated one."""
    case = HeadCase(batch=2, maps=MAPS, classes=3, attention="nxn" if attention == "folded" else attention)
    fused = FusedInterflowHead.from_eager(case.head()).requires_grad_(False)
    eager = fused.to_eager()
    return (fused.fold(), eager.fold(), head_inputs(case)) if attention == "folded" else (fused, eager, head_inputs(case))


def of_map(head, maps):
    return lambda x: head([x, maps[1]])


def of_branches(head, maps):
    return lambda x: torch.cat([t.flatten(1) for t in head.forward_branches([x, maps[1]])], 1)


def of_weight(head, maps):
    return lambda w: func.functional_call(head, {"weight": w}, (maps,))


SUBJECTS = {
    **{f"{attention}, map": (of_map, attention) for attention in (*ATTENTIONS, "folded")},
    **{f"{attention}, weight": (of_weight, attention) for attention in ATTENTIONS},
    "gated, branches": (of_branches, "gated"),
}


def head_subject(name):
    """f of the fused head, f of the plain one, and the argument."""
    of, attention = SUBJECTS[name]
    fused, eager, maps = heads(attention)
    x = fused.weight.detach().clone() if of is of_weight else maps[0]
    return of(fused, maps), of(eager, maps), x


def tap_subject(name):
    """f of the stage tap, f of it in plain PyTorch, and the argument; no value lies where relu or max-pool have a kink."""
    form, argument = name.split(", ")
    u = (torch.randperm(32, generator=torch.Generator().manual_seed(0)).float() / 16 - 0.99).reshape(1, 2, 4, 4)
    shift = torch.tensor([0.011, -0.013])

    def of(x):
        m, p = stage_tap(x, shift, max_pool=form == "pooled") if argument == "map" else stage_tap(u, x, max_pool=form == "pooled")
        return p.sin() if m is None else torch.cat([m.flatten(1).sin(), p.sin()], 1)

    def plain(x):
        with backend("eager"):
            return of(x)

    return of, plain, u if argument == "map" else shift


TAPS = ("pooled, map", "pooled, shift", "mean, map", "mean, shift")


def all_of(f, transforms):
    """Every transform of f in one function, so that they are compiled as one graph."""
    made = [transform(f) for transform in transforms.values()]
    return lambda x: [g(x) for g in made]


def compare(subject, transforms, compiler, chosen="auto"):
    torch._dynamo.reset()
    f, plain, x = subject
    wanted = [transform(plain)(x) for transform in transforms.values()]
    with backend(chosen):
        compiled = torch.compile(all_of(f, transforms), fullgraph=True, backend=compiler)(x)
        for name, got, want in zip(transforms, compiled, wanted, strict=True):
            assert want.abs().max() > 0, f"{name}: a test with nothing but zeros"
            assert_close(f"{name}, compiled", got, want, TOLERANCE)
            if name in REVERSE:
                assert_close(f"{name}, uncompiled", transforms[name](f)(x), want, TOLERANCE)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_compiled_transforms_of_the_head(subject):
    compare(head_subject(subject), TRANSFORMS, "eager")


@pytest.mark.parametrize("subject", TAPS)
def test_compiled_transforms_of_the_tap(subject):
    compare(tap_subject(subject), TRANSFORMS, "eager")


def subject_of(name):
    return tap_subject(name) if name in TAPS else head_subject(name)


@pytest.mark.parametrize("chosen", ["native", "eager"])
@pytest.mark.parametrize("subject", ["nxn, map", "pooled, map"])
def test_compiled_transforms_by_backend(subject, chosen):
    forward = FORWARD if chosen == "eager" else {}
    compare(subject_of(subject), {"grad": REVERSE["grad"], "vmap": REVERSE["vmap"]} | forward, "eager", chosen)


@pytest.mark.parametrize("subject", ["nxn, map", "gated, weight", "pooled, map"])
def test_compiled_transforms_by_aot_autograd(subject):
    compare(subject_of(subject), TRANSFORMS, "aot_eager")


@pytest.mark.parametrize("subject", ["nxn, map", "pooled, map"])
def test_compiled_transforms_by_inductor(subject):
    compare(subject_of(subject), {"grad": REVERSE["grad"], "vmap": REVERSE["vmap"]}, "inductor")


@pytest.mark.parametrize("name", FORWARD | TWICE)
def test_refused_in_a_sentence(name):
    transform = (FORWARD | TWICE)[name]
    for subject, remedy in (("gated, map", r"use the head's to_eager\(\), or backend\('eager'\)"), ("pooled, map", r"use backend\('eager'\)")):
        f, plain, x = subject_of(subject)
        assert transform(plain)(x).isfinite().all()
        what = "double backward" if name in TWICE else r"forward-mode differentiation \(jvp, jacfwd, hessian\)"
        with pytest.raises(NotImplementedError, match=f"{what} is not implemented; {remedy}"):
            transform(f)(x)
        if name in FORWARD:
            torch._dynamo.reset()
            with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{what} is not implemented; {remedy}"):
                torch.compile(transform(f), fullgraph=True, backend="eager")(x)


def test_forward_mode_is_refused_by_every_road():
    fused, _, maps = heads("nxn")
    sentence = "forward-mode differentiation"
    with pytest.raises(NotImplementedError, match=sentence):  # in the gradient that comes from above
        func.jvp(lambda dy: func.vjp(of_map(fused, maps), maps[0])[1](dy)[0], (torch.ones(2, 3),), (torch.ones(2, 3),))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(maps[0], torch.ones_like(maps[0]))
        raw = torch.ops.interflow_kernels
        roads = [fused, fused.fold(), fused.forward_branches, lambda xs: stage_tap(xs[0]), lambda xs: raw.stage_tap(xs[0], None, True, True)]
        roads.append(lambda xs: raw.interflow_head(xs, fused.weight, None, fused.attention_weight, None, "nxn", [1, 1], False, None))
        roads.append(lambda xs: raw.stage_tap_backward(None, xs[0].sum((2, 3)), torch.zeros(64, dtype=torch.uint8), xs[0], False, False, False))
        for f in roads:
            for mode in (torch.no_grad, torch.enable_grad):
                with mode(), pytest.raises(NotImplementedError, match=sentence):
                    f([dual, maps[1]])
        assert_close("nothing to differentiate", fused(maps), fused.to_eager()(maps), TOLERANCE)


def test_compiled_code_without_a_transform_keeps_the_operator():
    """Also in a function that was compiled under a transform before."""
    torch._dynamo.reset()
    fused, _, maps = heads("nxn")
    graphs = []
    compiled = torch.compile(of_map(fused, maps), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    operators = lambda graph: [str(node.target) for node in graph.graph.nodes if "interflow_kernels" in str(node.target)]  # noqa: E731
    torch.compile(func.grad(lambda x: of_map(fused, maps)(x).sum()), fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)(maps[0])
    assert operators(graphs.pop()) == []
    assert torch.equal(compiled(maps[0]), fused(maps))
    assert operators(graphs.pop()) == ["interflow_kernels.interflow_head.default"]


@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_around_compiled_functions(transform):
    """Dynamo leaves these uncompiled; what runs then must not be compiled in parts that lose the gradient."""
    fused, eager, maps = heads("gated")
    around = {"grad": lambda f: func.grad(lambda x: f(x).sin().sum()), "vmap": lambda f: lambda x: torch.vmap(lambda x: f(x))(torch.stack([x, 2 * x]))}[
        transform
    ]
    torch._dynamo.reset()
    compiled = torch.compile(of_map(fused, maps), backend="aot_eager")
    compiled(maps[0])
    assert_close(transform, around(compiled)(maps[0]), around(of_map(eager, maps))(maps[0]), TOLERANCE)


# --- second differentiations -------------------------------------------------------------------------------------------------
def test_frozen_gates_are_not_differentiated_twice_in_silence():
    """With constant dy only the pooled features carry the second derivative of "gated"."""
    fused, eager, maps = heads("gated")
    twice = lambda head: func.grad(lambda x: func.grad(lambda x: of_map(head, maps)(x).sum())(x).square().sum())(maps[0])  # noqa: E731
    assert twice(eager).abs().max() > 1e-4
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        twice(fused)
    leaf = maps[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(fused([leaf, maps[1]]).sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        torch.autograd.grad(g.square().sum(), leaf)


@pytest.mark.parametrize("use", [0, 1])
def test_second_backward_of_the_tap_with_constant_gradients(use):
    u = torch.randn(1, 2, 4, 4, requires_grad=True)
    for call in (stage_tap, lambda u: torch.ops.interflow_kernels.stage_tap(u, None, True, True)):
        (g,) = torch.autograd.grad(call(u)[use].sum(), u, create_graph=True)
        with pytest.raises(NotImplementedError, match="double backward is not implemented"):
            g.sum().backward()
    second = func.grad(lambda u: func.grad(lambda u: stage_tap(u)[use].sum())(u).sum())(u.detach())
    assert torch.equal(second, torch.zeros_like(u))  # its value: the tap is linear in pieces


def test_the_folded_head_differentiates_its_features():
    fused, eager, maps = heads("folded")
    want = torch.autograd.grad(eager([x.requires_grad_() for x in maps]).sin().sum(), maps)
    for name, got, expected in zip(("features[0]", "features[1]"), torch.autograd.grad(fused(maps).sin().sum(), maps), want, strict=True):
        assert_close(name, got, expected, TOLERANCE)
    mapped = interflow_head({"a": maps[0], "b": maps[1]}, *[t.detach() for t in (eager.weight, torch.zeros(2, 3), torch.ones(2, 3))], attention="classwise")
    assert_close("mapping", mapped, eager(maps) - eager.bias, TOLERANCE)
