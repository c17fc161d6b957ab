"""The pooling half and heads with a norm on a GPU: the head's own bits, fp64's results, two launches of ours forward."""

import copy

import pytest
import torch
from on_device import DTYPES, head_on, raw_head

from interflow_kernels import FusedInterflowHead
from interflow_kernels.testing import ATTENTIONS, LAYOUTS, HeadCase, assert_close, assert_same_bits, gradients

raw_pool = torch.ops.interflow_kernels.interflow_pool.default
MAPS = ((64, 40, 40), (5, 13, 9), (32, 14, 14))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooling_alone_has_the_heads_bits(dtype, layout, device):
    for pool_size in ((1, 1), (2, 3)):
        maps = head_on(HeadCase(37, MAPS, dtype=dtype, layout=layout), device)[1]
        weight = torch.zeros(3, sum(c for c, _, _ in MAPS) * pool_size[0] * pool_size[1], device=device)
        want = raw_head(maps, weight, None, None, None, "folded", list(pool_size), False, None)[2]
        for _ in range(3):
            assert_same_bits("pooled", raw_pool(maps, list(pool_size)), want)
        assert_same_bits("one image", raw_pool([x[36:] for x in maps], list(pool_size)), want[36:])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_norm_beside_fp64(attention, training, layout, device):
    case = HeadCase(8, MAPS, layout=layout)
    head = FusedInterflowHead([c for c, _, _ in MAPS], 10, attention, norm="batch", device=device).train(training)
    exact = copy.deepcopy(head).to_eager().double()
    maps, dy = head_on(case, device)[1], torch.randn(8, 10, device=device)
    (got, got_gradients), (want, want_gradients) = gradients(head, maps, dy, None), gradients(exact, [x.double() for x in maps], dy.double(), None)
    for name, expected in {**want, **want_gradients}.items():
        if expected is not None:
            assert_close(name, {**got, **got_gradients}[name], expected, 1e-4)
    assert_close("running_var", head.norm.running_var, exact.norm.running_var, 1e-5)


def test_two_launches_of_ours_forward(device):
    if device.type != "cuda":
        pytest.skip("counts a GPU's kernels")
    head, maps = FusedInterflowHead([c for c, _, _ in MAPS], 10, norm="batch", device=device).eval(), head_on(HeadCase(8, MAPS), device)[1]
    with torch.no_grad():
        head(maps)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            head(maps)
    ours = [event.key for event in profile.key_averages() if "interflow" in event.key or event.key.startswith(("head_pool", "head_tail"))]
    assert len(ours) == 2, ours
