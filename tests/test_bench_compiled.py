"""Compiled peers: every figure names its torch, and the report says what torch.compile made of the max-pool's backward pass."""

import copy
import re

import pytest
import torch
from bench_modules import CPU, case, charts, readme, report, results, room, run, synthetic

headline, inductor = room("gpu.headline"), room("gpu.inductor")


def test_what_is_compiled_names_its_torch():
    run_ = copy.deepcopy(synthetic(0, cases=1))
    about = {"pass": "inference", "dtype": "bf16", "layout": "nchw", "batch": 8, "pixels": 224, "compiled": True}
    kinds = {"Interflow fused": "ours", "plain": "base"}
    network = case.Case("network", "vgg16 compiled", "wall", {n: case.Provider(lambda i: None, kind) for n, kind in kinds.items()}, about, images=8)
    run_.rows.extend(run.summary(network, {"Interflow fused": [1e-3] * 9, "plain": [2e-3] * 9}, n, CPU) for n in kinds)
    for row in run_.rows[:3]:
        row["provider"] = {"eager": "compiled"}.get(row["provider"], row["provider"])
        row["speed_up"] = {("compiled" if name == "eager" else name): ratio for name, ratio in row.get("speed_up", {}).items()}
        row["best_peer"] = row.get("best_peer") and "compiled"
    shown = results.versioned(run_)
    assert results.versioned(shown) == shown and run_.rows[1]["provider"] == "compiled"  # two runs are compared by the plain names
    text = report.markdown(run_) + readme.section(run_, "x")
    for line in text.splitlines():
        assert not re.search(r"\bcompiled\b(?! \(torch 2\.13\.0\))", line), line
    assert text.count("compiled (torch 2.13.0)") >= 6
    charts.charts(run_)


# --- what torch.compile did -------------------------------------------------------------------------------------------------
BLOCK = "triton_poi_{0}_3 = async_compile.triton('triton_poi_{0}_3', '''\nimport triton\ndef triton_poi_{0}_3(in_ptr0):\n    {1}\n''', device_str='cuda')\n"
POOL = "fused_max_pool2d_with_indices_backward"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BLOCK.format(POOL, "tl.atomic_add(out_ptr0 + x, tmp, xmask)"), "scatter"),
        (BLOCK.format(POOL, "tl.store(out_ptr0 + x, tmp, xmask)"), "gather"),
        (BLOCK.format(POOL, "pass") + "aten.scatter_reduce_.two(buf3, 2, index, src, reduce='sum')", "scatter"),
        ("buf = torch.ops.aten.max_pool2d_with_indices_backward.default(a, b, [2, 2])", "PyTorch's own kernel"),
        (BLOCK.format("fused_relu", "tl.atomic_add(x)"), "unknown"),
        ("", "unknown"),
    ],
)
def test_how_the_max_pools_backward_was_compiled(text, expected):
    assert inductor.pool_backward([text]) == expected


@pytest.mark.slow
def test_what_torch_compile_really_writes():
    torch._dynamo.reset()
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    before = len(inductor.generated())
    torch.compile(lambda t: torch.nn.functional.max_pool2d(t.relu(), 2, 2), dynamic=False)(x).sum().backward()
    texts = [path.read_text() for path in inductor.generated()[before:]]
    assert inductor.pool_backward(texts) in (inductor.SCATTER, inductor.GATHER, inductor.OWN)


def test_a_compiled_row_names_its_torch_and_kernels():
    found = [{"name": "triton_poi_fused_relu_0", "us": 12.0}, {"name": "sm90_fprop", "us": 9.0}]
    told = inductor.told(found, [BLOCK.format(POOL, "tl.atomic_add(x)")])
    assert told == {"pool_backward": "scatter", "kernels": [("triton_poi_fused_relu_0", 12.0)]}
    row = {
        "case": "vgg16",
        "kind": "ours",
        "provider": "plain",
        "pass": "training step",
        "p50_us": 1.0,
        "images_per_s": 2.0,
        "torch": "2.11.0",
        "inductor": told,
    }
    row["speed_up"] = {name: [1.0, 0.9, 1.1] for name in headline.NAMES[1:]}
    shown = headline.shown({"rows": [row], "machine": {}, "commit": "x"})
    assert "vgg16 by torch 2.11.0" in shown and "max-pool backward by scatter" in shown
