"""Where NaN and infinities stand in the head's results: in the outputs as plain PyTorch has them, and a gradient is finite where its own is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interflow_kernels import functional, interflow_head, reference
from interflow_kernels.testing import ATTENTIONS, assert_close

NAN, INF = float("nan"), float("inf")
MODES = (*ATTENTIONS, "folded")


def arguments(attention, dtype=torch.float32, seed=0):
    """Named leaves of a head of three stages (a map in each layout, one pooled), in steps of 1/4 with zeros among them; dy and dZ."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: ((torch.randn(*shape, generator=generator) * 4).round() / 4).to(dtype)  # noqa: E731
    n, k, widths = 3, 5, (9, 21, 2)
    named = {"features[0]": draw(2, 9, 3, 2), "features[1]": draw(2, 21, 2, 2).contiguous(memory_format=torch.channels_last), "features[2]": draw(2, 2)}
    named |= {"weight": draw(k, sum(widths)), "bias": draw(n, k)}
    shape = {"nxn": (n, n), "gated": (n, n), "classwise": (n, k), "folded": None}.get(attention, (n,))
    offset = {"hard": None, "1xn": (1,), "classwise": (k,), "folded": (k,)}.get(attention, (n,))
    named |= {} if shape is None else {"attention_weight": draw(*shape)}
    named |= {} if offset is None else {"attention_bias": draw(*offset)}
    return named, {"dy": draw(2, k), "dbranches": draw(2, n, k)}


def run(head, attention, named, upstream):
    leaves = {name: t.detach().requires_grad_() for name, t in named.items()}
    features = [leaves[f"features[{i}]"] for i in range(3)]
    parameters = [leaves.get(name) for name in ("weight", "bias", "attention_weight", "attention_bias")]
    y, z = head(features, *parameters, attention, (1, 1))
    pairs = [(out, upstream[name]) for name, out in (("dy", y), ("dbranches", z)) if name in upstream]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs], allow_unused=True)
    return {"y": y.detach(), "branches": z.detach()}, dict(zip(leaves, grads, strict=True))


def fused(*given):
    return functional.run_head(*given, True)


def check(attention, named, upstream, what):
    outputs, grads = run(fused, attention, named, upstream)
    expected, expected_grads = run(reference.interflow_head, attention, named, upstream)
    for name, e in expected.items():
        a = outputs[name]
        assert torch.equal(a.isnan(), e.isnan()), f"NaN in {name} of {what}: {a.tolist()}, expected {e.tolist()}"
        assert torch.equal(a[e.isinf()], e[e.isinf()]), f"infinities in {name} of {what}: {a.tolist()}, expected {e.tolist()}"
        assert torch.equal(a.isinf(), e.isinf()), f"infinities in {name} of {what}: {a.tolist()}, expected {e.tolist()}"
    for name, e in expected_grads.items():
        a = grads[name]
        if a is None or e is None:  # an upstream gradient that does not reach it
            assert (a is None or not a.any()) and (e is None or not e.any()), f"d{name} of {what}"
            continue
        assert torch.equal(a.isfinite(), e.isfinite()), f"d{name} of {what}: {a.tolist()}, expected {e.tolist()}"


# --- placement -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("attention", MODES)
def test_one_special_number_anywhere(attention, value):
    named, upstream = arguments(attention)
    for name in (*named, *upstream):
        for place in (0, -1):
            given = {k: t.clone() for k, t in (named | upstream).items()}
            given[name][tuple(0 if place == 0 else s - 1 for s in given[name].shape)] = value
            for used in (("dy",), ("dbranches",), ("dy", "dbranches")):
                check(attention, {k: given[k] for k in named}, {k: given[k] for k in used}, f"{value} in {name}, place {place}, with {used}")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    attention=st.sampled_from(MODES), seed=st.integers(0, 10**6), count=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data()
)
def test_special_numbers_together(attention, seed, count, dtype, data):
    named, upstream = arguments(attention, dtype, seed)
    places = []
    for _ in range(count):
        name = data.draw(st.sampled_from([*named, *upstream]))
        t = (named | upstream)[name]
        at = tuple(data.draw(st.integers(0, s - 1)) for s in t.shape)
        t[at] = data.draw(st.sampled_from([NAN, INF, -INF, 0.0]))
        places.append((name, at, float(t[at])))
    used = data.draw(st.sampled_from([("dy",), ("dbranches",), ("dy", "dbranches")]))
    check(attention, named, {k: upstream[k] for k in used}, f"{places} with {used}")


@pytest.mark.parametrize(
    "matrix", [[[INF, 1, 0], [1, 1, 0], [0, 0, 1]], [[INF, 0, 0], [-INF, 1, 0], [0, 0, 1]], [[INF, 1, 0], [INF, 1, 0], [INF, 1, 0]]], ids=str
)
def test_nxn_with_infinite_weights(matrix):
    named, upstream = arguments("nxn")
    named["attention_weight"] = torch.tensor(matrix, dtype=torch.float32)
    check("nxn", named, upstream, matrix)


def test_nxn_with_an_infinite_score_beside_a_zero_weight():
    """0 * inf of the definition is NaN, though the sum of M's column is 1/n."""
    named, upstream = arguments("nxn")
    named["attention_weight"], named["bias"][0, 0] = torch.eye(3) / 3, INF
    check("nxn", named, upstream, "the identity")
    assert run(fused, "nxn", named, upstream)[0]["y"][:, 0].isnan().all()


# --- large numbers: finite where the definition is ---------------------------------------------------------------------------------
def test_nxn_whose_column_sum_is_too_large():
    named, upstream = arguments("nxn")
    named["attention_weight"] = torch.tensor([[3e38, 0, 0], [3e38, 1, 0], [0, 0, 1]])
    named["features[0]"] *= 1e-6
    named["bias"] *= 1e-6
    check("nxn", named, upstream | {"dy": upstream["dy"] * 1e-6}, "a column sum of 6e38")
    y, expected = (run(head, "nxn", named, upstream)[0]["y"] for head in (fused, reference.interflow_head))
    assert expected.isfinite().all()
    assert_close("y", y, expected, 1e-5)


def test_nxn_whose_weights_cancel_is_more_exact_than_term_by_term():
    torch.manual_seed(0)
    features, weight = [torch.randn(2, 4), torch.randn(2, 4)], torch.randn(3, 8)
    y = interflow_head(features, weight, None, torch.tensor([[1e30, 1.0], [-1e30, 1.0]]), attention="nxn")
    assert_close("y", y, 2 * features[1].double() @ weight[:, 4:].double().T, 1e-6)


def test_half_precision_overflows_only_where_y_does():
    named, _ = arguments("nxn", torch.float16)
    named["attention_weight"] = torch.tensor([[65504.0, 0, 0], [65504.0, 1, 0], [0, 0, 1]]).half()
    y = run(fused, "nxn", named, {"dy": torch.ones(2, 5).half()})[0]["y"]
    wide = {name: t.double() for name, t in named.items()}
    exact = run(reference.interflow_head, "nxn", wide, {"dy": torch.ones(2, 5).double()})[0]["y"]
    assert torch.equal(y.isinf(), exact.abs() >= 65520) and not y.isnan().any()
