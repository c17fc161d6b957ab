"""Long sums of head and tap on the CPU: error <= max(2 * eager PyTorch's error, 1.5 * eps), in a table of inputs, layouts and sizes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accuracy_cases import LINEAR, assert_no_worse, composed_tap, error, exact_means, exact_products, longdouble, map_of, outputs_and_gradients, products

from interflow_kernels import functional, reference, stage_tap
from interflow_kernels.testing import in_layout

raw_head = torch.ops.interflow_kernels.interflow_head.default
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KINDS = pytest.mark.parametrize("kind", ["constant", "random"])
LAYOUTS = ("contiguous", "channels_last", "cropped", "sliced", "permuted", "tokens")


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def pooled(x, pool_size=(1, 1)):
    """[B, D] as the operator pools it, before any product."""
    weight = x.new_ones(1, x.shape[1] * pool_size[0] * pool_size[1])
    return raw_head([x], weight, None, None, None, "folded", pool_size, False, None)[2]


def fused(*arguments):
    return functional.run_head(*arguments, True)


# --- means of maps --------------------------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("height", "width", "channels"), [(14, 14, 67), (7, 56, 40), (224, 224, 20), (1024, 1024, 3)])
def test_means(height, width, channels, layout, dtype, kind):
    x = map_of(kind, channels, height, width, dtype)
    laid = x.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).unsqueeze(3) if layout == "tokens" else in_layout(x, layout)
    assert_no_worse("pooled", pooled(laid), F.adaptive_avg_pool2d(laid.to(wide(dtype)), 1).flatten(1), exact_means(kind, x, (1, 1)), most=3)


@KINDS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
@pytest.mark.parametrize("pool_size", [(2, 2), (3, 7), (1, 90)], ids=str)
def test_means_of_windows(pool_size, layout, dtype, kind):
    x = map_of(kind, 9, 181, 180, dtype)
    laid = in_layout(x, layout)
    eager = F.adaptive_avg_pool2d(laid.to(wide(dtype)), pool_size).flatten(1)
    assert_no_worse("pooled", pooled(laid, pool_size), eager, exact_means(kind, x, pool_size), most=3)


# --- products: over D forward, over K, B and all of it backward -------------------------------------------------------------------
SIZES = {  # batch, widths, classes: which sums are long
    "batch": (8192, (40, 24), 10),
    "columns": (3, (25088, 700), 6),
    "classes": (2, (9, 33), 21000),
}


def check_products(kind, attention, size, dtype, branches):
    batch, widths, classes = SIZES[size]
    P = products(kind, attention, batch, widths, classes, dtype, branches)
    exact = exact_products(P, attention)
    found = {name: outputs_and_gradients(P, attention, head) for name, head in (("fused", fused), ("eager", reference.interflow_head))}
    for name, expected in exact.items():
        assert_no_worse(name, found["fused"][name], found["eager"][name], expected)


@KINDS
@pytest.mark.parametrize("branches", [False, True], ids=["y", "y+branches"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", LINEAR)
@pytest.mark.parametrize("size", SIZES)
def test_products(size, attention, dtype, branches, kind):
    check_products(kind, attention, size, dtype, branches)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", ["batch", "classes"])
def test_products_gated(size, dtype, kind):
    check_products(kind, "gated", size, dtype, True)


def test_equal_images_give_equal_bias_gradients():
    """8192 equal images: the gradient of a bias is one image's, 8192 times; a power of two, and the sum in fp64, so exactly."""
    dy = torch.rand(1, 10).expand(8192, 10)
    P = products("constant", "1xn", 8192, (8,), 10, torch.float32, False)._replace(dy=dy, attention_weight=torch.ones(1))
    assert torch.equal(outputs_and_gradients(P, "1xn", fused)["bias"], 8192 * dy[:1])


# --- the stage tap ------------------------------------------------------------------------------------------------------------------
@KINDS
@pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "sliced", "permuted"])
@pytest.mark.parametrize(("batch", "channels", "side"), [(1, 3, 1024), (2, 20, 225), (2048, 9, 6)])
def test_tap(batch, channels, side, layout, dtype, max_pool, kind):
    images = map_of(kind, channels * (batch if kind == "random" else 1), side, side, dtype)
    u = in_layout(images.view(-1, channels, side, side).expand(batch, -1, -1, -1).contiguous(), layout)
    shift = torch.rand(channels).to(dtype)
    up = torch.rand(2, channels, dtype=torch.float64).to(dtype)  # of each maximum, and of each mean
    found = {}
    for name, tap in (("fused", lambda u, s, pool: stage_tap(u, s, max_pool=pool)), ("eager", composed_tap)):
        leaf = shift.clone().requires_grad_()
        m, p = tap(u, leaf, max_pool)
        pairs = [(p, up[1].expand(p.shape))] + ([] if m is None else [(m, up[0][:, None, None].expand(m.shape))])
        found[name] = p, torch.autograd.grad([o for o, _ in pairs], leaf, [g for _, g in pairs])[0]
    v = u + shift[:, None, None]  # all above 0: every gradient passes
    assert_no_worse("p", found["fused"][0], found["eager"][0], longdouble(v[:, :, 0, 0]) if kind == "constant" else longdouble(v).mean((2, 3)), most=3)
    windows = (side // 2) ** 2 if max_pool else 0
    assert_no_worse("dshift", found["fused"][1], found["eager"][1], batch * (windows * longdouble(up[0]) + longdouble(up[1])))


def test_an_error_is_seen():
    """The comparison itself: a sum that one level gives is refused."""
    x = torch.full((1, 1, 256, 256), 0.1)
    naive = torch.from_numpy(np.cumsum(x.flatten().numpy()))[-1].reshape(1, 1) / x.numel()
    exact = longdouble(x[:, :, 0, 0])
    assert error(naive, exact)[0] > 1e-6
    with pytest.raises(AssertionError, match=r"pooled\[0, 0\]: 0\.\d+, exactly 0\.1"):
        assert_no_worse("pooled", naive, F.adaptive_avg_pool2d(x, 1).flatten(1), exact)


# --- bits ---------------------------------------------------------------------------------------------------------------------------
DIGEST = """
import hashlib, sys
sys.path.insert(0, {folder!r})
from test_head_accuracy import DTYPES, LAYOUTS, in_layout, map_of, pooled, torch
digest = hashlib.sha256()
for dtype in DTYPES:
    for layout in LAYOUTS[:-1]:
        for size in ((19, 9, 13), (3, 131, 140), (515, 6, 7), (2, 1, 900)):
            for pool_size in ((1, 1), (1, 3)):
                torch.manual_seed(1)
                digest.update(pooled(in_layout(map_of("random", *size, dtype), layout), pool_size).numpy().tobytes())
print(digest.hexdigest())
"""


def test_instruction_sets_pool_to_the_same_bits():
    digests = set()
    for isa in ("baseline", ""):
        code = DIGEST.format(folder=os.path.dirname(__file__))
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "INTERFLOW_CPU_ISA": isa}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        digests.add(done.stdout)
    assert len(digests) == 1
