"""The fused head against the fp64 reference: outputs and every gradient by name, over layouts, dtypes, modes and sizes."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interflow_kernels import FusedInterflowHead, interflow_head
from interflow_kernels.info import build_info
from interflow_kernels.reference import pooled_stage
from interflow_kernels.testing import ATTENTIONS, LAYOUTS, TOLERANCE, HeadCase, assert_close, gradients, head_inputs, in_layout, magnitudes

raw_head = torch.ops.interflow_kernels.interflow_head
DTYPES = tuple(TOLERANCE)


def check(case: HeadCase, features=None, use=("y", "branches")) -> float:
    """Runs the case fused and in fp64, compares pooled values, outputs and gradients; returns the worst error."""
    plain = case.head()
    fused = FusedInterflowHead.from_eager(plain)
    features = head_inputs(case) if features is None else features
    exact = copy.deepcopy(plain).double()
    g = torch.Generator().manual_seed(2)
    n, k = len(case.maps), case.classes
    dy = torch.randn(features[0].shape[0], k, generator=g, dtype=torch.float64).to(case.dtype) if "y" in use else None
    dz = torch.randn(features[0].shape[0], n, k, generator=g, dtype=torch.float64).to(case.dtype) if "branches" in use else None
    outputs, grads = gradients(fused, features, dy, dz)
    wanted, wanted_grads = gradients(exact, [x.double() for x in features], dy, dz)
    magnitude = magnitudes(plain, features, dy, dz)
    pooled = [torch.cat([pooled_stage(f(x.double()), case.pool_size) for x in features], 1) for f in (torch.abs, lambda x: x)]
    got = raw_head(features, fused.weight, None, None, None, "folded", case.pool_size, False, None)[2]
    worst = assert_close("pooled", got, pooled[1], magnitude=pooled[0])
    worst = max(worst, *(assert_close(name, outputs[name], wanted[name], magnitude=magnitude[name]) for name in wanted))
    for name, expected in wanted_grads.items():
        actual = grads[name]
        if actual is None or expected is None:
            assert expected is None or not expected.any(), f"{name}: no gradient"
            assert actual is None or not actual.any(), f"{name}: a gradient where none is expected"
            continue
        like = features[int(name[9:-1])] if name.startswith("features") else fused.weight
        assert actual.dtype == like.dtype, name
        worst = max(worst, assert_close(name, actual, expected, magnitude=magnitude[name]))
    return worst


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_modes_dtypes_layouts(attention, dtype, layout):
    check(HeadCase(attention=attention, dtype=dtype, layout=layout))


@pytest.mark.parametrize("use", [("y",), ("branches",), ("y", "branches")], ids="+".join)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=["none", "bias", "attention_bias"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_gradient_may_be_missing_and_biases_too(attention, biases, use):
    check(HeadCase(attention=attention, bias=biases[0], attention_bias=biases[1]), use=use)


@pytest.mark.parametrize("pool_size", [(2, 3), (4, 4), (7, 1), (13, 9), (20, 20)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_adaptive_windows(pool_size, layout, dtype):
    check(HeadCase(pool_size=pool_size, layout=layout, dtype=dtype, maps=((5, 13, 9), (18, 7, 7), (33, 4, 1))))


@pytest.mark.parametrize("classes", [1, 2, 3, 7, 8, 9, 23, 24, 25, 27, 100])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 9, 65])
def test_tiles(batch, classes):
    check(HeadCase(batch=batch, classes=classes, attention="classwise", maps=((17, 3, 3), (40, 2, 2))))
    check(HeadCase(batch=batch, classes=classes, attention="gated", maps=((17, 3, 3), (40, 2, 2))), use=("y",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "maps",
    [
        ((64, 112, 112), (520, 6, 5)),  # runs of pixels meet in partial sums; more channels than a slab
        ((1, 1, 1), (1, 40, 1), (1, 1, 40)),
        ((3, 5, 7),) * 16,
        ((130, 1, 1), (1030, 2, 9), (16, 1, 33)),
        ((2, 300, 301),),
    ],
    ids=["runs", "ones", "sixteen", "rows", "plane"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_shapes(maps, layout, dtype):
    check(HeadCase(batch=2, maps=maps, layout=layout, dtype=dtype))


@pytest.mark.parametrize(("batch", "classes"), [(9, 1000), (2, 21_841)])
@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_many_classes(attention, batch, classes):
    check(HeadCase(batch=batch, classes=classes, attention=attention, maps=((24, 4, 4), (9, 3, 3))), use=("y",))


@pytest.mark.parametrize("channels", range(1, 41))
def test_channel_counts(channels):
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(HeadCase(batch=1, classes=3, attention="1xn", maps=((channels, 5, 4), (channels, 1, 1)), layout=layout, dtype=dtype), use=("y",))


sizes = st.integers(1, 20)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    maps=st.lists(st.tuples(st.integers(1, 70), sizes, sizes), min_size=1, max_size=5),
    batch=st.integers(1, 6),
    classes=st.integers(1, 30),
    attention=st.sampled_from(ATTENTIONS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    pool_size=st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1)]),
)
def test_any_shape(maps, batch, classes, attention, layout, dtype, pool_size):
    check(HeadCase(batch, tuple(maps), classes, attention, pool_size, layout=layout, dtype=dtype))


# --- other forms of a feature -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_features(dtype):
    case = HeadCase(dtype=dtype, maps=((17, 1, 1), (40, 1, 1)))
    pooled = [x.flatten(1) for x in head_inputs(case)]
    check(case, pooled)
    check(case, [pooled[0].t().contiguous().t(), pooled[1]])
    if dtype in (torch.bfloat16, torch.float16):
        check(case, [x.float() for x in pooled])


def test_pooled_beside_maps():
    case = HeadCase(maps=((17, 6, 5), (40, 3, 3)))
    maps = head_inputs(case)
    check(case, [maps[0], maps[1].mean((2, 3))])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nhwc_and_tokens(dtype):
    case = HeadCase(dtype=dtype, maps=((17, 6, 5), (40, 9, 1)))
    nchw = head_inputs(case)
    head = FusedInterflowHead.from_eager(case.head())
    args = (head.weight, head.bias, head.attention_weight, head.attention_bias)
    tokens = nchw[1].permute(0, 2, 3, 1).flatten(1, 2).contiguous().requires_grad_()
    nhwc = nchw[0].permute(0, 2, 3, 1).contiguous().requires_grad_()
    y = interflow_head([nhwc, tokens], *args, layout="NHWC")
    expected = copy.deepcopy(head.to_eager()).double()([x.double() for x in nchw])
    assert_close("y", y, expected)
    y.sum().backward()
    assert nhwc.grad.shape == nhwc.shape
    assert tokens.grad.shape == tokens.shape
    mixed = interflow_head([nchw[0], tokens], *args, layout=("NCHW", "NHWC"))
    assert_close("y", mixed, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_empty_batch(attention):
    case = HeadCase(batch=0, attention=attention)
    outputs, grads = gradients(FusedInterflowHead.from_eager(case.head()), head_inputs(case), torch.zeros(0, 10), torch.zeros(0, 3, 10))
    assert outputs["y"].shape == (0, 10)
    assert outputs["branches"].shape == (0, 3, 10)
    assert all(g is None or not g.any() for g in grads.values())
    assert grads["weight"].shape == (10, 44)


# --- gradients' form --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_feature_gradients_are_expanded(layout):
    case = HeadCase(layout=layout)
    seen = []
    maps = [x.requires_grad_() for x in head_inputs(case)]
    produced = [x * 2 for x in maps]
    for x in produced:
        x.register_hook(lambda g: seen.append(g.stride()[2:]))
    FusedInterflowHead.from_eager(case.head())(produced).sum().backward()
    assert seen == [(0, 0)] * 3


def test_backward_allocates_nothing_of_a_maps_size():
    case = HeadCase(batch=2, maps=((64, 64, 64), (64, 64, 64)), classes=10)
    maps = [x.requires_grad_() for x in head_inputs(case)]
    produced = [x.view_as(x) for x in maps]
    head = FusedInterflowHead.from_eager(case.head())
    with torch.profiler.profile(profile_memory=True) as profile:
        y = head(produced)
        torch.autograd.grad(y.sum(), produced)
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert 0 < largest < maps[0].nbytes / 50, largest


def test_frozen_inputs_cost_nothing():
    case = HeadCase()
    head = FusedInterflowHead.from_eager(case.head()).requires_grad_(False)
    maps = head_inputs(case)
    maps[1].requires_grad_()
    head(maps).sum().backward()
    assert maps[1].grad is not None
    assert maps[0].grad is None
    pooled = torch.randn(3, 44)
    run = torch.ops.interflow_kernels.interflow_head_backward
    results = run(torch.ones(3, 10), None, pooled, head.weight, head.bias, head.attention_weight, None, "nxn", [5, 32, 7], [1], False, False, False)
    assert [r.numel() for r in results] == [3 * 44, 0, 0, 0, 0]
    assert not results[0][:, :5].any()
    assert results[0][:, 5:37].any()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_gradient_alone_is_the_same_to_the_bit(attention):
    case = HeadCase(attention=attention, batch=5)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    dy, dz = torch.randn(5, 10), torch.randn(5, 3, 10)
    whole = gradients(head, maps, dy, dz)[1]
    named = dict(head.named_parameters())
    for name, expected in whole.items():
        leaves = [x.detach().requires_grad_(name == f"features[{i}]") for i, x in enumerate(maps)]
        for other, parameter in named.items():
            parameter.requires_grad_(other == name)
        target = named[name] if name in named else leaves[int(name[9:-1])]
        (alone,) = torch.autograd.grad(head.forward_branches(leaves), [target], [dy, dz])
        assert torch.equal(alone, expected), name


@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_strides_of_upstream_gradients_and_parameters_do_not_matter(attention):
    case = HeadCase(attention=attention, batch=5)
    head, maps = case.head(), head_inputs(case)
    given = {name: t.detach() for name, t in head.named_parameters()}
    strided = {name: t.repeat_interleave(2, -1)[..., ::2] if t.dim() == 1 else t.t().contiguous().t() for name, t in given.items()}
    dy, dz = torch.randn(5, 1).expand(5, 10), torch.randn(10, 3, 5).permute(2, 1, 0)
    results = []
    for parameters, upstream in ((given, (dy.contiguous(), dz.contiguous())), (strided, (dy, dz))):
        leaves = {name: t.detach().requires_grad_() for name, t in parameters.items()}
        outputs = interflow_head(maps, **leaves, attention=attention, return_branches=True)
        results.append([*outputs, *torch.autograd.grad(outputs, list(leaves.values()), upstream)])
    assert not strided["weight"].is_contiguous()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# --- special values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_special_values_propagate(attention, dtype, layout, value):
    case = HeadCase(layout=layout, attention=attention, dtype=dtype)
    maps = head_inputs(case)
    maps[1][1, 3, 2, 5] = value
    head = FusedInterflowHead.from_eager(case.head())
    y, expected = head(maps), head.to_eager()(maps)
    assert y[0].isfinite().all()
    assert torch.equal(y.isfinite(), expected.isfinite())
    if attention != "nxn":  # there eager adds infinities of either sign, the kernel one infinity times their weights' sum
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y[y.isinf()], expected[y.isinf()])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_nan_upstream_reaches_its_image_only(attention):
    case = HeadCase(attention=attention)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    dy, dz = torch.randn(3, 10), torch.randn(3, 3, 10)
    dy[1, 4] = float("nan")
    grads, expected = gradients(head, maps, dy, dz)[1], gradients(head.to_eager(), maps, dy, dz)[1]
    for name, e in expected.items():
        assert torch.equal(grads[name].isnan(), e.isnan()), name
    assert not grads["features[0]"][0].isnan().any()
    assert grads["features[0]"][1].isnan().all()


def test_half_precision_keeps_subnormals_and_extremes():
    for dtype in (torch.float16, torch.bfloat16):
        info = torch.finfo(dtype)
        values = torch.tensor([info.max / 16, info.tiny, info.smallest_normal / 4, -info.max / 64, 0.0, 1.0, -1.0, info.eps], dtype=dtype)
        maps = values.reshape(1, 8, 1, 1).expand(1, 8, 3, 3)
        weight = torch.eye(8, dtype=torch.float32)
        for layout in ("contiguous", "channels_last"):
            with torch.autocast("cpu", dtype=dtype):
                y = torch.ops.interflow_kernels.interflow_head([in_layout(maps, layout)], weight, None, None, None, "folded", [1, 1], False, torch.float32)[0]
            assert_close("y", y[0], values.double() * 1.0, 1e-6)
            assert_close("small", y[0, 1:3] / float(values[1]), values[1:3].double() / float(values[1]), 1e-6)


# --- bits -------------------------------------------------------------------------------------------------------------
def all_bits(head, maps, with_branches):
    batch, n, k = maps[0].shape[0], head.num_stages, head.num_classes
    g = torch.Generator().manual_seed(5)
    dy = torch.randn(batch, k, generator=g).to(head.weight.dtype)
    dz = torch.randn(batch, n, k, generator=g).to(head.weight.dtype) if with_branches else None
    outputs, grads = gradients(head, maps, dy, dz)
    return [*outputs.values(), *(g for g in grads.values() if g is not None)]


MAPS = ((64, 56, 56), (136, 28, 28), (48, 7, 7))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_bits_repeat_over_runs_and_threads(attention, layout, threads):
    case = HeadCase(batch=5, maps=MAPS, classes=100, attention=attention, layout=layout)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    for with_branches in (False, True):
        first = all_bits(head, maps, with_branches)
        for run in range(20):
            threads(1 + run % 2)
            assert all(torch.equal(a, b) for a, b in zip(first, all_bits(head, maps, with_branches), strict=True)), run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_image_does_not_depend_on_its_batch(attention, layout, dtype):
    case = HeadCase(batch=67, maps=((64, 28, 28), (40, 7, 7)), classes=50, attention=attention, layout=layout, dtype=dtype)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    dy = torch.randn(67, 50).to(dtype)

    def run(chosen):
        part = [in_layout(x[chosen], layout) for x in maps]
        outputs, grads = gradients(head, part, dy[chosen], None)
        return [outputs["y"], outputs["branches"], grads["features[0]"], grads["features[1]"]]

    whole = run(torch.arange(67))
    for chosen in ([0], [66], [3, 66, 0, 9, 12, 1, 2], [66, 65]):
        for a, b in zip(whole, run(torch.tensor(chosen)), strict=True):
            assert torch.equal(a[chosen], b)


def test_forward_and_forward_branches_agree_to_the_bit():
    for attention in ATTENTIONS:
        case = HeadCase(attention=attention)
        head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
        assert torch.equal(head(maps), head.forward_branches(maps)[0])
        with torch.inference_mode():
            assert torch.equal(head(maps), head.forward_branches(maps)[0])


# --- either instruction set, in memory that malloc fills -------------------------------------------------------------------
MATRIX = """
import itertools, sys
sys.path.insert(0, {folder!r})
from test_interflow_head import *
for attention, dtype, layout in itertools.product(ATTENTIONS, DTYPES, ("contiguous", "channels_last", "sliced", "permuted")):
    check(HeadCase(attention=attention, dtype=dtype, layout=layout, maps=((17, 9, 5), (40, 4, 4)), classes=11))
for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
    check(HeadCase(2, ((18, 7, 7), (33, 4, 1)), pool_size=(3, 2), dtype=dtype, layout=layout))
    check(HeadCase(2, ((520, 9, 9), (64, 40, 40)), dtype=dtype, layout=layout), use=("y",))
    check(HeadCase(5, ((16, 3, 3),), classes=7, dtype=dtype, layout=layout, attention="gated"), use=("branches",))
    for value in (float("nan"), float("inf")):
        test_special_values_propagate("classwise", dtype, layout, value)
test_half_precision_keeps_subnormals_and_extremes()
test_frozen_inputs_cost_nothing()
for attention in ATTENTIONS:
    test_empty_batch(attention)
case = HeadCase(maps=((64, 28, 28),), classes=50)
print(FusedInterflowHead.from_eager(case.head())(head_inputs(case)).double().sum().item().hex())
"""


@pytest.mark.slow
def test_instruction_sets_and_unwritten_memory():
    sums = {}
    for isa in ("baseline", ""):
        # glibc fills what malloc gives and what free takes: an output or a scratch value that nobody wrote shows as -1.7e38.
        environment = dict(os.environ, INTERFLOW_CPU_ISA=isa, MALLOC_PERTURB_="1", MALLOC_MMAP_MAX_="0")
        code = MATRIX.format(folder=os.path.dirname(__file__))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        sums[isa] = done.stdout.strip()
    # Fused multiply-add rounds once less: the last bits tell whether the variable really switches.
    assert (sums["baseline"] != sums[""]) == build_info()["has_avx2"]


def test_memory_that_malloc_gives_is_filled():
    """That the test above can fail: fresh memory, small and large, really has 0xFE in every byte there."""
    code = "import torch; print([torch.empty(n, dtype=torch.uint8).eq(0xFE).float().mean().item() > 0.9 for n in (999, 3_000_000)])"
    environment = dict(os.environ, MALLOC_PERTURB_="1", MALLOC_MMAP_MAX_="0")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "[True, True]", done.stderr


def test_dtype_of_a_case_reaches_the_head():
    assert replace(HeadCase(), dtype=torch.bfloat16).head().weight.dtype == torch.bfloat16
