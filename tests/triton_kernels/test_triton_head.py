"""The head's Triton kernels against the fp64 reference: outputs and every gradient by name."""

import copy
import os
import warnings

import pytest
import torch
from example_count import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from interflow_kernels import FusedInterflowHead, backend, interflow_head
from interflow_kernels.reference import pooled_stage
from interflow_kernels.testing import ATTENTIONS, LAYOUTS, HeadCase, assert_close, gradients, head_inputs, in_layout, magnitudes
from interflow_kernels.triton import tiles
from interflow_kernels.triton.common.launch import noted
from interflow_kernels.triton.common.products import MULTIPLY_ADDS
from interflow_kernels.triton.interflow_head import backward as backward_host
from interflow_kernels.triton.interflow_head import forward as forward_host

raw_head = torch.ops.interflow_kernels.interflow_head
raw_backward = torch.ops.interflow_kernels.interflow_head_backward
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"  # hypothesis mixes badly with the fixture of this name
EXAMPLES = examples(200 if DEVICE == "cuda" else 6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # inf - inf


@pytest.fixture
def unsplit(monkeypatch):
    """As on RDNA: products multiply fp32 as it is. Ends with a look at whether they did."""
    for module in (forward_host, backward_host):
        monkeypatch.setattr(module, "products_on", lambda device: MULTIPLY_ADDS)
    with tiles.replaced(tiles.table()), noted() as launches:
        yield
    flags = [launch.constants[launch.kernel.arg_names.index("SPLIT") - len(launch.arguments)] for launch in launches if "SPLIT" in launch.kernel.arg_names]
    assert flags and not any(flags)


def moved(x, layout, device):
    """x on the device, in its layout again."""
    return in_layout(x.to(device), layout) if x.dim() == 4 else x.to(device)


def on_cpu(found):
    return {name: None if t is None else t.cpu() for name, t in found.items()}


def check(case, device, features=None, use=("y", "branches")):
    """Runs the case in Triton and in fp64, compares pooled values, outputs and gradients."""
    plain = case.head()
    fused = FusedInterflowHead.from_eager(copy.deepcopy(plain)).to(device)
    features = head_inputs(case) if features is None else features
    exact = copy.deepcopy(plain).double()
    g = torch.Generator().manual_seed(2)
    n, k = len(case.maps), case.classes
    dy = torch.randn(case.batch, k, generator=g, dtype=torch.float64).to(case.dtype) if "y" in use else None
    dz = torch.randn(case.batch, n, k, generator=g, dtype=torch.float64).to(case.dtype) if "branches" in use else None
    given = [moved(x, case.layout, device) for x in features]
    outputs, grads = map(on_cpu, gradients(fused, given, *(None if t is None else t.to(device) for t in (dy, dz))))
    with backend("eager"):
        wanted, wanted_grads = gradients(exact, [x.double() for x in features], dy, dz)
        magnitude = magnitudes(plain, features, dy, dz)
    pooled = [torch.cat([pooled_stage(f(x.double()), case.pool_size) for x in features], 1) for f in (torch.abs, lambda x: x)]
    got = raw_head(given, fused.weight, None, None, None, "folded", case.pool_size, False, None)[2]
    assert_close("pooled", got.cpu(), pooled[1], magnitude=pooled[0])
    for name in wanted:
        assert_close(name, outputs[name], wanted[name], magnitude=magnitude[name])
    for name, expected in wanted_grads.items():
        actual = grads[name]
        if actual is None or expected is None:
            assert expected is None or not expected.any(), f"{name}: no gradient"
            assert actual is None or not actual.any(), f"{name}: a gradient where none is expected"
            continue
        like = features[int(name[9:-1])] if name.startswith("features") else plain.weight
        assert actual.dtype == like.dtype, name
        assert_close(name, actual, expected, magnitude=magnitude[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts(dtype, layout, device):
    check(HeadCase(2, ((5, 7, 5), (40, 4, 6)), 5, dtype=dtype, layout=layout), device)


@pytest.mark.parametrize("attention", ["nxn", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_fp32_as_it_is(dtype, attention, device, unsplit):
    for use in (("y",), ("y", "branches")):
        check(HeadCase(17, ((40, 2, 1), (33, 1, 1)), 18, attention, dtype=dtype), device, use=use)


@pytest.mark.parametrize("use", [("y",), ("branches",), ("y", "branches")], ids="+".join)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_modes_and_missing_gradients(attention, use, device):
    for bias, attention_bias, dtype in ((True, True, torch.bfloat16), (False, False, torch.float32)):
        check(HeadCase(2, ((5, 4, 3), (18, 1, 1)), 18, attention, bias=bias, attention_bias=attention_bias, dtype=dtype), device, use=use)


@pytest.mark.parametrize("pool_size", [(2, 3), (3, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_adaptive_windows(pool_size, layout, device):
    check(HeadCase(1, ((5, 5, 4), (18, 2, 1)), 3, pool_size=pool_size, layout=layout, dtype=torch.bfloat16), device)


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (17, 16), (33, 17)])
def test_tiles(batch, classes, device):
    check(
        HeadCase(batch, ((17, 1, 1), (66, 1, 1)), classes, "classwise"),
        device,
        [x.flatten(1) for x in head_inputs(HeadCase(batch, ((17, 1, 1), (66, 1, 1))))],
        use=("y",),
    )
    check(HeadCase(batch, ((17, 1, 1),), classes, "gated"), device)


@pytest.mark.parametrize(
    ("maps", "layout"),
    [
        (((64, 40, 40), (72, 2, 2)), "channels_last"),  # parts that meet in the tail
        (((2, 290, 300),), "contiguous"),  # parts of one plane
        (((1, 290, 300),), "cropped"),
        (((1, 1, 1), (1, 40, 1), (1, 1, 40)), "contiguous"),
        (((3, 1, 2),) * 16, "contiguous"),
        (((130, 1, 1), (1030, 1, 3), (16, 1, 9)), "channels_last"),
        (((70, 1, 9), (16, 5, 3)), "sliced"),
    ],
    ids=["parts", "plane", "cropped plane", "ones", "sixteen", "rows", "sliced"],
)
def test_shapes(maps, layout, device):
    check(HeadCase(1, maps, 3, "gated", layout=layout, dtype=torch.bfloat16), device, use=("y",))


sizes = st.integers(1, 9)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True)
@given(
    maps=st.lists(st.tuples(st.integers(1, 70), sizes, sizes), min_size=1, max_size=3),
    batch=st.integers(0, 3),
    classes=st.integers(1, 40),
    attention=st.sampled_from(ATTENTIONS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    pool_size=st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1)]),
)
def test_any_shape(maps, batch, classes, attention, layout, dtype, pool_size):
    if batch == 0:
        layout = "contiguous"
    if pool_size != (1, 1):
        batch, maps = min(batch, 1), maps[:1]
    check(HeadCase(batch, tuple(maps), classes, attention, pool_size, layout=layout, dtype=dtype), DEVICE)


@pytest.mark.parametrize(("count", "dtype"), [(1, torch.float16), (4, torch.float32), (4, torch.bfloat16), (5, torch.bfloat16)], ids=str)
def test_pooled_features(dtype, count, device):
    """Up to four go to the tail directly, five by way of the pool; any strides; fp32 beside bf16 and fp16."""
    case = HeadCase(dtype=dtype, maps=((17, 1, 1), (33, 1, 1), (8, 1, 1), (3, 1, 1), (2, 1, 1))[:count])
    pooled = [x.flatten(1) for x in head_inputs(case)]
    check(case, device, pooled, use=("y",))
    check(case, device, [pooled[0].t().contiguous().t(), *(x.float() for x in pooled[1:])])
    check(case, device, [pooled[0][:1].expand(3, -1), *pooled[1:]], use=("branches",))


def test_pooled_beside_maps(device):
    case = HeadCase(maps=((17, 6, 5), (40, 3, 3)))
    maps = head_inputs(case)
    check(case, device, [maps[0], maps[1].mean((2, 3))])


def test_features_of_mixed_dtypes_under_autocast(device):
    case = HeadCase(2, ((4, 6, 5), (8, 3, 3), (8, 1, 1)), 5)
    head = FusedInterflowHead.from_eager(case.head()).to(device)
    maps = [x.to(device, t) for x, t in zip(head_inputs(case), (torch.bfloat16, torch.float32, torch.float16), strict=True)]
    expected = copy.deepcopy(head.to_eager()).double()([x.double() for x in maps])
    with torch.autocast(device, dtype=torch.bfloat16):
        y = head(maps)
    assert y.dtype == torch.bfloat16
    assert_close("y", y, expected, 8e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_folded(dtype, device):
    case = HeadCase(dtype=dtype, maps=((17, 6, 5), (40, 3, 3)))
    head = FusedInterflowHead.from_eager(case.head()).to(device)
    folded, maps = head.fold(), [x.to(device) for x in head_inputs(case)]
    expected = folded.weight.double() @ torch.cat([x.double().mean((2, 3)) for x in maps], 1).T + folded.bias.double()[:, None]
    assert_close("y", folded(maps), expected.T, {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype])


def test_frozen_inputs_cost_nothing(device):
    head = FusedInterflowHead.from_eager(HeadCase().head()).requires_grad_(False).to(device)
    rest = (torch.randn(3, 44, device=device), head.weight, head.bias, head.attention_weight, None, "nxn", [5, 32, 7])
    results = raw_backward(torch.ones(3, 10, device=device), None, *rest, [1], False, False, False)
    assert [r.numel() for r in results] == [3 * 44, 0, 0, 0, 0]
    assert not results[0][:, :5].any() and not results[0][:, 37:].any()
    assert results[0][:, 5:37].all()
    for needs in ((True, False, False), (False, True, False), (False, False, True)):
        whole = raw_backward(torch.ones(3, 10, device=device), None, *rest, [0, 1, 2], True, True, True)
        alone = raw_backward(torch.ones(3, 10, device=device), None, *rest, [], *needs)
        for a, w, needed in zip(alone[1:], whole[1:], (needs[0], needs[1], needs[2], False), strict=True):
            assert torch.equal(a, w) if needed else a.numel() == 0


@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_strides_of_upstream_gradients_and_parameters_do_not_matter(attention, device):
    case = HeadCase(attention=attention, batch=5)
    head, maps = case.head(), [x.to(device) for x in head_inputs(case)]
    given = {name: t.detach().to(device) for name, t in head.named_parameters()}
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] if t.dim() == 1 else t.t().contiguous().t() for name, t in given.items()}
    dy, dz = torch.randn(5, 1, device=device).expand(5, 10), torch.randn(10, 3, 5, device=device).permute(2, 1, 0)
    results = []
    for parameters, upstream in ((given, (dy.contiguous(), dz.contiguous())), (strided, (dy, dz))):
        leaves = {name: t.detach().requires_grad_() for name, t in parameters.items()}
        outputs = interflow_head(maps, **leaves, attention=attention, return_branches=True)
        results.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("split", [True, False], ids=["parts", "as it is"])
@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_propagate(dtype, value, split, device, request):
    if not split:
        request.getfixturevalue("unsplit")
    for attention in ("classwise", "gated"):
        case = HeadCase(2, ((5, 4, 3), (32, 3, 6)), attention=attention, dtype=dtype)
        maps = [x.to(device) for x in head_inputs(case)]
        maps[1][1, 3, 2, 5] = value
        head = FusedInterflowHead.from_eager(case.head()).to(device)
        y, expected = head(maps), head.to_eager()(maps)
        assert y[0].isfinite().all()
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[y.isinf()], expected[y.isinf()])


def test_infinite_weights_give_what_the_reference_gives_where_products_are_not_split(device, unsplit):
    case = HeadCase(2, ((5, 1, 1), (32, 1, 1)), 3)
    head, maps = FusedInterflowHead.from_eager(case.head()).to(device), [x.to(device) for x in head_inputs(case)]
    with torch.no_grad():
        head.weight[1, 9] = float("inf")
    y, expected = head(maps), head.to_eager()(maps)
    assert expected[:, 1].isinf().all() and torch.equal(y.isinf(), expected.isinf()) and torch.equal(y[:, 1], expected[:, 1])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nan_upstream_reaches_its_image_only(attention, device):
    case = HeadCase(3, ((5, 3, 2), (9, 1, 1), (7, 1, 1)), attention=attention)
    head, maps = FusedInterflowHead.from_eager(case.head()).to(device), [x.to(device) for x in head_inputs(case)]
    dy, dz = torch.randn(3, 10, device=device), torch.randn(3, 3, 10, device=device)
    dy[1, 4] = float("nan")
    grads, expected = gradients(head, maps, dy, dz)[1], gradients(head.to_eager(), maps, dy, dz)[1]
    for name, e in expected.items():
        assert torch.equal(grads[name].isnan(), e.isnan()), name


@pytest.mark.parametrize(
    ("attention", "dtype", "split"),
    [("nxn", torch.float32, True), ("gated", torch.bfloat16, True), ("gated", torch.float32, False)],
    ids=str,
)
def test_an_image_does_not_depend_on_its_batch(attention, dtype, split, device, request):
    if not split:
        request.getfixturevalue("unsplit")
    case = HeadCase(19, ((64, 3, 2), (40, 1, 1)), 20, attention, layout="channels_last", dtype=dtype)
    head, maps = FusedInterflowHead.from_eager(case.head()).to(device), [x.to(device) for x in head_inputs(case)]
    dy = torch.randn(19, 20).to(device, dtype)

    def run(chosen):
        part = [in_layout(x[chosen], "channels_last") for x in maps]
        outputs, grads = gradients(head, part, dy[chosen], None)
        return [outputs["y"], outputs["branches"], grads["features[0]"], grads["features[1]"]]

    whole = run(torch.arange(19))
    for chosen in ([0], [18], [3, 18, 0, 9, 12, 1, 2]):
        for a, b in zip(whole, run(torch.tensor(chosen)), strict=True):
            assert torch.equal(a[chosen], b)


def test_fp64_goes_to_another_backend_and_a_raw_call_says_so(device):
    case = HeadCase(2, ((4, 3, 3),), 5, dtype=torch.float64)
    head, maps = FusedInterflowHead.from_eager(case.head()).to(device), [x.to(device) for x in head_inputs(case)]
    with backend("auto"):
        assert_close("y", head(maps), head.to_eager()(maps))
    with pytest.raises(RuntimeError, match="'triton' was asked for but has no fp64 kernels"):
        head(maps)
    with pytest.raises(RuntimeError, match=r"the Triton kernels take .* in fp32, bf16 or fp16, got torch.float64"):
        raw_head(maps, head.weight, None, None, None, "folded", [1, 1], False, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(features=[torch.zeros(2, 4, 3)]), r"features\[0\] must be \[B, C, H, W\]"),
        (dict(features=[torch.zeros(2, 4, 0, 3)]), "H and W of at least 1"),
        (dict(weight=torch.zeros(5, 3)), "weight must have D = 4 columns"),
        (dict(weight=torch.zeros(0, 4)), "K of at least 1"),
        (dict(bias=torch.zeros(5)), r"bias must be \[1, 5\]"),
        (dict(attention="soft"), "attention must be one of"),
        (dict(attention_weight=None), "attention_weight must be a tensor"),
        (dict(pool_size=[0, 1]), "pool_size must be two numbers of at least 1"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_errors_of_raw_calls(change, sentence, device):
    arguments = dict(features=[torch.zeros(2, 4, 3, 3)], weight=torch.zeros(5, 4), bias=None, attention_weight=torch.zeros(1), attention_bias=None)
    arguments |= dict(attention="hard", pool_size=[1, 1], need_branches=False, dtype=None) | change
    on = lambda v: v.to(device) if isinstance(v, torch.Tensor) else [x.to(device) for x in v] if isinstance(v, list) and isinstance(v[0], torch.Tensor) else v  # noqa: E731
    with pytest.raises(RuntimeError, match=sentence):
        raw_head(**{name: on(v) for name, v in arguments.items()})
