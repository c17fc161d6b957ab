"""interflow_pool in Triton: the bits of the head's own pooled values, one launch; a head with a norm takes two."""

import copy
import os

import pytest
import torch

from interflow_kernels import FusedInterflowHead, backend
from interflow_kernels.reference import interflow_pool as reference_pool
from interflow_kernels.testing import LAYOUTS, HeadCase, assert_close, assert_same_bits, gradients, head_inputs, in_layout
from interflow_kernels.triton.common.launch import noted

raw = torch.ops.interflow_kernels.interflow_pool.default
raw_head = torch.ops.interflow_kernels.interflow_head.default
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LARGE = ((40, 70, 70), (5, 7, 5), (16, 1, 1))  # the first in parts, that meet


def on(device, case):
    return [in_layout(x.to(device), case.layout) for x in head_inputs(case)]


def pooled_by_the_head(maps, pool_size):
    width = reference_pool(maps, pool_size).shape[1]
    weight = torch.zeros(3, width, device=maps[0].device)
    return raw_head(maps, weight, None, None, None, "folded", list(pool_size), False, None)[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_heads(dtype, layout, device):
    maps = on(device, HeadCase(2, ((5, 7, 5), (40, 4, 6)), dtype=dtype, layout=layout))
    for pool_size in ((1, 1), (2, 3)):
        got = raw(maps, list(pool_size))
        assert_same_bits("pooled", got, pooled_by_the_head(maps, pool_size))
        exact = [reference_pool([f(x.cpu().double()) for x in maps], pool_size) for f in (lambda x: x, torch.abs)]
        assert_close("pooled", got.cpu(), exact[0], magnitude=exact[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_parts_that_meet(layout, device):
    maps = on(device, HeadCase(2, LARGE, layout=layout))
    with noted() as launches:
        got = raw(maps, [1, 1])
    assert [launch.kernel.__name__ if hasattr(launch.kernel, "__name__") else str(launch.kernel) for launch in launches] == ["head_pool_whole"]
    partial, arrivals = launches[0].arguments[17], launches[0].arguments[18]
    assert (partial is None) == (arrivals is None)
    assert partial is not None or layout == "contiguous"
    assert arrivals is None or not arrivals.any()  # zero again
    assert_same_bits("pooled", got, pooled_by_the_head(maps, (1, 1)))


def test_pooled_features_and_empty_batches(device):
    maps = on(device, HeadCase(2, ((5, 7, 5), (40, 4, 6))))
    given = [maps[0], maps[1].mean((2, 3))]
    assert_same_bits("pooled", raw(given, [1, 1]), pooled_by_the_head(given, (1, 1)))
    assert raw([x[:0] for x in given], [1, 1]).shape == (0, 45)


def test_refusals(device):
    with pytest.raises(RuntimeError, match=r"interflow_pool: features\[1\] must have the batch of features\[0\], 1, got \[2, 2, 3, 3\]"):
        raw([torch.ones(1, 2, 3, 3, device=device), torch.ones(2, 2, 3, 3, device=device)], [1, 1])


def test_a_head_with_a_norm_takes_two_launches_and_gives_what_it_should(device):
    case = HeadCase(4, ((5, 7, 5), (18, 4, 6)), 5, "classwise")
    head = FusedInterflowHead([5, 18], 5, "classwise", norm="batch").to(device).train()
    exact = copy.deepcopy(head).cpu().double()
    maps, dy = on(device, case), torch.randn(4, 5)
    with noted() as launches:
        head.eval()(maps)
    assert [launch.kernel.__name__ if hasattr(launch.kernel, "__name__") else str(launch.kernel) for launch in launches] == ["head_pool_whole", "head_tail"]
    got, got_gradients = gradients(head.train(), maps, dy.to(device), None)
    with backend("eager"):
        want, want_gradients = gradients(exact.train(), [x.cpu().double() for x in maps], dy.double(), None)
    for name, expected in {**want, **want_gradients}.items():
        actual = {**got, **got_gradients}[name]
        assert (actual is None) == (expected is None), name
        if expected is not None:
            assert_close(name, actual.cpu(), expected, 1e-5)


def test_it_is_triton_that_runs():
    assert os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()
