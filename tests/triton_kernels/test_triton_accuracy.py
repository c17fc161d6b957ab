"""The head's Triton kernels: long sums beside eager PyTorch's own error, NaN and infinities beside its results."""

import os
import warnings

import pytest
import test_special_values as special
import torch
import torch.nn.functional as F
from accuracy_cases import assert_no_worse, exact_means, exact_products, map_of, outputs_and_gradients, products

from interflow_kernels import reference
from interflow_kernels.testing import in_layout

warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")  # inf - inf
raw_head = torch.ops.interflow_kernels.interflow_head
KINDS = pytest.mark.parametrize("kind", ["constant", "random"])
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = {"batch": (256 if INTERPRETED else 8192, (20, 12), 5), "columns": (2, (1040, 70), 6), "classes": (2, (9, 33), 500)}


@KINDS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("side", "channels", "pool_size"), [(14, 67, (1, 1)), (225, 20, (1, 1)), (1024, 2, (1, 1)), (90, 6, (2, 3))])
def test_means(side, channels, pool_size, layout, kind, device):
    x = map_of(kind, channels, side, side, torch.float32)
    laid = in_layout(x.to(device), layout)
    pooled = raw_head([laid], laid.new_ones(1, channels * pool_size[0] * pool_size[1]), None, None, None, "folded", pool_size, False, None)[2]
    eager = F.adaptive_avg_pool2d(in_layout(x, layout), pool_size).flatten(1)
    assert_no_worse("pooled", pooled.cpu(), eager, exact_means(kind, x, pool_size), most=3)


@KINDS
@pytest.mark.parametrize(("attention", "branches"), [("nxn", False), ("classwise", True), ("gated", False)], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_products(size, attention, branches, kind, device):
    batch, widths, classes = SIZES[size]
    P = products(kind, attention, batch, widths, classes, torch.float32, branches)
    exact, eager = exact_products(P, attention), outputs_and_gradients(P, attention, reference.interflow_head)
    found = outputs_and_gradients(P.to(device), attention, special.fused)
    for name, expected in exact.items():
        assert_no_worse(name, found[name].cpu(), eager[name], expected)


def moved(tensors, device):
    return {name: t.to(device) for name, t in tensors.items()}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("attention", special.MODES)
def test_special_numbers(attention, value, device):
    named, upstream = (moved(t, device) for t in special.arguments(attention))
    for place, name in enumerate((*named, *upstream)):
        given = {k: t.clone() for k, t in (named | upstream).items()}
        given[name][tuple(place % size for size in given[name].shape)] = value
        used = (("dy",), ("dbranches",), ("dy", "dbranches"))[place % 3]
        special.check(attention, {k: given[k] for k in named}, {k: given[k] for k in used}, f"{value} in {name} with {used}")


@pytest.mark.parametrize("matrix", [[[3e38, 0, 0], [3e38, 1, 0], [0, 0, 1]], [[float("inf"), 0, 0], [-float("inf"), 1, 0], [0, 0, 1]]], ids=str)
def test_nxn_whose_column_sum_is_not_finite(matrix, device):
    named, upstream = special.arguments("nxn")
    named["attention_weight"] = torch.tensor(matrix)
    for name in ("features[0]", "bias"):
        named[name] *= 1e-6
    special.check("nxn", moved(named, device), {"dy": upstream["dy"].to(device) * 1e-6}, matrix)


def test_nxn_with_an_infinite_score_beside_a_zero_weight(device):
    named, upstream = special.arguments("nxn")
    named["attention_weight"], named["bias"][0, 0] = torch.eye(3) / 3, float("inf")
    special.check("nxn", moved(named, device), moved(upstream, device), "the identity")
