"""The pooling half as an operator: the head's own bits, gradients that are views, wiring, refusals."""

import pytest
import torch

from interflow_kernels import functional, ops
from interflow_kernels.reference import interflow_pool as reference_pool
from interflow_kernels.testing import LAYOUTS, TOLERANCE, HeadCase, assert_close, assert_same_bits, head_inputs

raw = torch.ops.interflow_kernels.interflow_pool.default
raw_head = torch.ops.interflow_kernels.interflow_head.default
MAPS = ((5, 13, 9), (64, 40, 40), (7, 3, 4), (520, 6, 5))


def same_bits_as_the_head(maps, pool_size=(1, 1)):
    """interflow_pool's result beside the third of interflow_head's."""
    bins = pool_size[0] * pool_size[1]
    weight = torch.zeros(
        3, sum(x.shape[1] * (bins if x.dim() == 4 else 1) for x in maps), dtype=torch.float64 if maps[0].dtype == torch.float64 else torch.float32
    )
    got = raw(maps, list(pool_size))
    assert_same_bits("pooled", got, raw_head(maps, weight, None, None, None, "folded", list(pool_size), False, None)[2])
    return got


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_bits_are_the_heads(dtype, layout):
    for pool_size in ((1, 1), (2, 3)):
        maps = head_inputs(HeadCase(batch=3, maps=MAPS, dtype=dtype, layout=layout))
        got = same_bits_as_the_head(maps, pool_size)
        exact = [f([x.double() for x in maps], pool_size) for f in (reference_pool, lambda xs, s: reference_pool([x.abs() for x in xs], s))]
        assert_close("pooled", got, exact[0], magnitude=exact[1])


def test_each_feature_may_have_its_own_dtype_and_be_pooled_already():
    maps = [x.to(kind) for x, kind in zip(head_inputs(HeadCase(maps=MAPS)), (torch.bfloat16, torch.float16, torch.float32, torch.float32), strict=True)]
    maps[2] = maps[2].mean((2, 3))
    same_bits_as_the_head(maps)


def test_an_images_bits_are_the_same_in_every_batch():
    for layout in ("contiguous", "channels_last"):
        maps = head_inputs(HeadCase(batch=9, maps=MAPS, layout=layout))
        whole = raw(maps, [1, 1])
        for chosen in ([4], [8, 0, 3]):
            assert_same_bits("some", raw([x[chosen] for x in maps], [1, 1]), whole[chosen])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout):
    for pool_size in ([1, 1], [2, 2]):
        maps = [x.requires_grad_() for x in head_inputs(HeadCase(batch=2, maps=((4, 6, 5), (8, 3, 3)), layout=layout))]
        torch.library.opcheck(raw, [maps, pool_size])


@pytest.mark.parametrize("pool_size", [(1, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("route", ["raw", "modules"])
def test_gradcheck(route, pool_size):
    maps = [x.requires_grad_() for x in head_inputs(HeadCase(batch=2, maps=((3, 4, 3), (2, 5, 2)), dtype=torch.float64))]
    run = raw if route == "raw" else functional.run_pool
    assert torch.autograd.gradcheck(lambda *m: run(list(m), pool_size), tuple(maps))
    assert torch.autograd.gradgradcheck(lambda *m: run(list(m), pool_size), tuple(maps))  # it is linear: a second differentiation is right


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_views_of_pooled_ones(layout):
    maps = [x.requires_grad_() for x in head_inputs(HeadCase(batch=2, maps=((4, 6, 5), (8, 3, 3)), layout=layout))]
    p = functional.run_pool(maps, (1, 1))
    dp = torch.randn_like(p)
    for g, x, part in zip(torch.autograd.grad(p, maps, dp), maps, dp.split((4, 8), 1), strict=True):
        assert g.stride()[2:] == (0, 0)
        assert_close("gradient", g, (part / (x.shape[2] * x.shape[3]))[:, :, None, None].expand_as(x))


def test_only_what_needs_a_gradient_gets_one():
    maps = head_inputs(HeadCase(batch=2, maps=((4, 6, 5), (8, 3, 3))))
    maps[1].requires_grad_()
    functional.run_pool(maps, (1, 1)).sum().backward()
    assert maps[0].grad is None and maps[1].grad is not None
    with torch.no_grad():
        assert not functional.run_pool(maps, (1, 1)).requires_grad


def test_transforms():
    maps = head_inputs(HeadCase(batch=6, maps=((4, 6, 5), (8, 3, 3))))
    stacked = [x.unflatten(0, (2, 3)) for x in maps]
    got = torch.func.vmap(lambda a, b: functional.run_pool([a, b], (1, 1)))(*stacked)
    assert_same_bits("vmap", got.flatten(0, 1), raw(maps, [1, 1]))
    grad = torch.func.grad(lambda x: functional.run_pool([x, maps[1]], (1, 1)).square().sum())(maps[0])
    leaf = maps[0].clone().requires_grad_()
    reference_pool([leaf, maps[1]]).square().sum().backward()
    assert_close("grad", grad, leaf.grad)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation"):
        torch.func.jvp(lambda x: functional.run_pool([x], (1, 1)), (maps[0],), (maps[0],))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_compiled(layout):
    torch._dynamo.reset()
    maps = [x.requires_grad_() for x in head_inputs(HeadCase(batch=2, maps=((4, 6, 5), (8, 3, 3)), layout=layout))]
    compiled = torch.compile(lambda m: functional.run_pool(m, (1, 1)), fullgraph=True, backend="aot_eager")
    assert_same_bits("compiled", compiled(maps), raw(maps, [1, 1]))
    for got, want in zip(*(torch.autograd.grad(f(maps).square().sum(), maps) for f in (compiled, lambda m: functional.run_pool(m, (1, 1)))), strict=True):
        assert_close("gradient", got, want)


def test_empty():
    assert raw([torch.empty(0, 4, 3, 3)], [1, 1]).shape == (0, 4)
    assert raw([torch.randn(2, 0, 3, 3), torch.randn(2, 4)], [1, 1]).shape == (2, 4)


@pytest.mark.parametrize(
    ("features", "pool_size", "sentence"),
    [
        ([], [1, 1], "interflow_pool: features must name 1 to 16 stages, got 0"),
        ([torch.ones(1, 2, 3)], [1, 1], r"interflow_pool: features\[0\] must be \[B, C, H, W\] or, already pooled, \[B, D_i\], got \[1, 2, 3\]"),
        (
            [torch.ones(1, 2, 3, 3), torch.ones(2, 2, 3, 3)],
            [1, 1],
            r"interflow_pool: features\[1\] must have the batch of features\[0\], 1, got \[2, 2, 3, 3\]",
        ),
        ([torch.ones(1, 2, 3, 3)], [0, 1], r"interflow_pool: pool_size must be two numbers of at least 1, got \[0, 1\]"),
        ([torch.ones(1, 2, 0, 3)], [1, 1], r"interflow_pool: features\[0\] must have H and W of at least 1"),
        ([torch.ones(1, 2, 3, 3).int()], [1, 1], r"interflow_pool: features\[0\] must be fp32, fp64, bf16 or fp16, got Int"),
        ([torch.ones(1, 2), torch.ones(1, 2).double()], [1, 1], r"interflow_pool: features must all be fp64 or none, got features\[1\] in Double beside Float"),
        ([torch.ones(1, 2, 3, 3).to_sparse()], [1, 1], r"interflow_pool: features\[0\] must be a dense tensor"),
    ],
)
def test_refusals(features, pool_size, sentence):
    with pytest.raises((RuntimeError, NotImplementedError), match=sentence if features else "features|backend"):
        raw(features, pool_size)


def test_it_is_one_of_the_operators():
    assert ops.interflow_pool is not None
