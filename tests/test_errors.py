"""Bad input: one sentence that names the argument, what was expected and what came, before anything is computed."""

import subprocess
import sys

import pytest
import torch

from interflow_kernels import AuxiliaryHeads, FusedInterflowHead, InterflowHead, interflow_head
from interflow_kernels.testing import Counted

HEADS = [InterflowHead, FusedInterflowHead]
X1, X2 = torch.randn(2, 4, 6, 5), torch.randn(2, 8, 3, 3)


def sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


BAD_FEATURES = [
    ([X1], ValueError, ("features must have 2", "got 1")),
    ([X1, X2, X2], ValueError, ("features must have 2", "got 3")),
    (X1, TypeError, ("features must be a list, a tuple or a mapping", "Tensor")),
    ([X1, 3], TypeError, ("features[1] must be a tensor", "int")),
    ([X1, X2[:, :7]], ValueError, ("features[1]", "8 channels", "got 7")),
    ([X1, X2[0]], ValueError, ("features[1]", "[B, C, H, W]", "(8, 3, 3)")),
    ([X1, torch.tensor(1.0)], ValueError, ("features[1]", "[B, C, H, W]", "()")),
    ([X1, X2[None]], ValueError, ("features[1]", "[B, C, H, W]", "(1, 2, 8, 3, 3)")),
    ([X1, X2[:1]], ValueError, ("features[1]", "batch of features[0], 2", "got 1")),
    ([X1, X2.long()], TypeError, ("features[1] must be floating point", "torch.int64")),
    ([X1, X2.bool()], TypeError, ("features[1] must be floating point", "torch.bool")),
    ([X1, X2.to(torch.complex64)], TypeError, ("features[1] must be floating point", "complex64")),
    ([X1, X2.bfloat16()], TypeError, ("features[1]", "torch.float32", "torch.bfloat16")),
    ([X1, X2.double()], TypeError, ("features[1]", "torch.float32", "torch.float64")),
    ([X1, X2[:, :, :0]], ValueError, ("features[1]", "H and W of at least 1", "(2, 8, 0, 3)")),
    ([X1, X2[:, :, :, :0]], ValueError, ("features[1]", "H and W of at least 1", "(2, 8, 3, 0)")),
    ([X1, X2.to("meta")], ValueError, ("features[1]", "device of weight, cpu", "meta")),
    ([X1, torch.randn(2, 9)], ValueError, ("features[1]", "8 pooled values", "got 9")),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("features", "kind", "parts"), BAD_FEATURES, ids=lambda v: v[0] if isinstance(v, tuple) else None)
def test_features(head, features, kind, parts):
    module = head((4, 8), 5)
    for call in (module, module.forward_branches):
        with pytest.raises(kind) as error:
            call(features)
        sentence(error, *parts)


def test_sixteen_bit_features():
    head = FusedInterflowHead((4, 8), 5, dtype=torch.bfloat16)
    head([X1.bfloat16(), X2.mean((2, 3))])  # pooled fp32 beside bf16 weights is fine
    with pytest.raises(TypeError) as error:
        head([X1.bfloat16(), X2.mean((2, 3)).double()])
    sentence(error, "features[1]", "torch.bfloat16", "torch.float64")
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError) as error:
        head([X1.bfloat16(), X2.double()])
    sentence(error, "features[1]", "torch.float64")


CONSTRUCTION = [
    (dict(in_channels=()), ValueError, ("in_channels", "1 to 16", "got 0")),
    (dict(in_channels=(1,) * 17), ValueError, ("in_channels", "1 to 16", "got 17")),
    (dict(in_channels=(4, 0)), ValueError, ("in_channels", "at least 1", "(4, 0)")),
    (dict(in_channels=(4, 2.5)), TypeError, ("in_channels", "ints", "2.5")),
    (dict(in_channels=4), TypeError, ("in_channels", "sequence", "4")),
    (dict(num_classes=0), ValueError, ("num_classes", "at least 1", "got 0")),
    (dict(num_classes=1.5), TypeError, ("num_classes", "int", "1.5")),
    (dict(attention="soft"), ValueError, ("attention", "'classwise'", "'soft'")),
    (dict(pool_size=-1), ValueError, ("pool_size", "at least 1", "-1")),
    (dict(pool_size=(2, 0)), ValueError, ("pool_size", "at least 1", "(2, 0)")),
    (dict(pool_size=(2, 2, 2)), TypeError, ("pool_size", "pair", "(2, 2, 2)")),
    (dict(pool_size="2"), TypeError, ("pool_size", "pair", "'2'")),
    (dict(layout="NWHC"), ValueError, ("layout", "'NHWC'", "'NWHC'")),
    (dict(layout=("NCHW",)), ValueError, ("layout", "2", "got 1")),
    (dict(attention="hard", hard_weights=(1.0,)), ValueError, ("hard_weights", "2 values", "got 1")),
    (dict(attention="hard", hard_weights=(1.0, float("nan"))), ValueError, ("hard_weights", "finite", "nan")),
    (dict(attention="hard", hard_weights=(1.0, float("inf"))), ValueError, ("hard_weights", "finite", "inf")),
    (dict(attention="hard", hard_weights=(1.0, "a")), TypeError, ("hard_weights", "numbers", "'a'")),
    (dict(attention="nxn", hard_weights=(1.0, 2.0)), ValueError, ("hard_weights", "'nxn'")),
    (dict(attention="hard", attention_bias=True), ValueError, ("attention_bias", "'hard'")),
    (dict(dtype=torch.int32), TypeError, ("dtype", "floating point", "int32")),
]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("arguments", "kind", "parts"), CONSTRUCTION, ids=lambda v: v[0] if isinstance(v, tuple) else None)
def test_construction(head, arguments, kind, parts):
    with pytest.raises(kind) as error:
        head(**{"in_channels": (4, 8), "num_classes": 5, **arguments})
    sentence(error, *parts)


def test_tokens_have_no_rows_to_pool():
    head = FusedInterflowHead((4,), 5, layout="NHWC", pool_size=2)
    with pytest.raises(ValueError, match="pool_size must be 1") as error:
        head([torch.randn(2, 9, 4)])
    sentence(error, "features[0]", "(2, 9, 4)")


W, B, M = torch.randn(5, 12), torch.randn(2, 5), torch.eye(2)
FUNCTION = [
    (dict(features=[]), ValueError, ("features", "1 to 16", "got 0")),
    (dict(features=X1), TypeError, ("features must be a list",)),
    (dict(weight=W[0]), ValueError, ("weight must be [K, D]", "(12,)")),
    (dict(weight=W[:0]), ValueError, ("weight", "at least one class", "(0, 12)")),
    (dict(weight=W[:, :11]), ValueError, ("weight", "D = 12", "11")),
    (dict(bias=B.t()), ValueError, ("bias", "[2, 5]", "(5, 2)")),
    (dict(bias=B.double()), TypeError, ("bias", "float32", "float64")),
    (dict(attention_weight=torch.randn(2)), ValueError, ("attention_weight", "[2, 2]", "(2,)")),
    (dict(attention_weight=None), ValueError, ("attention_weight", "[2, 2]", "None")),
    (dict(attention="gated"), ValueError, ("attention_bias", "'gated'", "None")),
    (dict(attention="hard", attention_weight=torch.ones(2), attention_bias=torch.ones(1)), ValueError, ("attention_bias", "'hard'")),
    (dict(attention="other"), ValueError, ("attention", "'other'")),
    (dict(attention="folded"), ValueError, ("attention", "'folded'")),
    (dict(pool_size=0), ValueError, ("pool_size", "0")),
    (dict(bias=B.to("meta")), ValueError, ("bias must be on the device of weight, cpu, got meta",)),
    (dict(attention_weight=M.to("meta")), ValueError, ("attention_weight must be on the device of weight, cpu, got meta",)),
    (dict(attention_bias=M[0].to("meta")), ValueError, ("attention_bias must be on the device of weight, cpu, got meta",)),
    (dict(features=[X1.to("meta"), X2]), ValueError, ("features[0] must be on the device of weight, cpu, got meta",)),
    (dict(features=[X1, X2.to("meta")]), ValueError, ("features[1] must be on the device of weight, cpu, got meta",)),
    (dict(weight=W.to("meta")), ValueError, ("features[0] must be on the device of weight, meta, got cpu",)),
]


@pytest.mark.parametrize(("arguments", "kind", "parts"), FUNCTION, ids=lambda v: v[0] if isinstance(v, tuple) else None)
def test_function(arguments, kind, parts):
    with pytest.raises(kind) as error:
        interflow_head(**{"features": [X1, X2], "weight": W, "bias": B, "attention_weight": M, **arguments})
    sentence(error, *parts)


def test_auxiliary_heads():
    for arguments in (dict(in_channels=()), dict(num_classes=0), dict(weight=float("nan")), dict(weight=-1.0)):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            AuxiliaryHeads(**{"in_channels": (4, 8), "num_classes": 5, **arguments})
    heads = AuxiliaryHeads((4, 8), 5)
    with pytest.raises(ValueError, match="8 channels"):
        heads([X1, X1])
    with pytest.raises(ValueError, match=r"branches must be \[B, n, K\]"):
        heads.loss(torch.randn(2, 5), torch.tensor([0, 1]))


def test_nothing_is_computed_before_raising():
    head = FusedInterflowHead((4, 8), 5)
    for features in ([X1, X2[:, :7]], [X1, X2.double()], [X1, X2[:1]], [X1]):
        for call in (head, lambda x: interflow_head(x, head.weight, head.bias, head.attention_weight)):
            with Counted() as counted, pytest.raises((ValueError, TypeError)):
                call(features)
            assert counted.operators == []
    with Counted() as counted:
        head([X1, X2])
    assert counted.operators  # the counter counts


FUZZ = """
import itertools, torch
import interflow_kernels
raw = torch.ops.interflow_kernels.interflow_head
back = torch.ops.interflow_kernels.interflow_head_backward
x = [torch.randn(2, 4, 6, 5), torch.randn(2, 8, 3, 3)]
good = dict(features=x, weight=torch.randn(5, 12), bias=torch.randn(2, 5), attention_weight=torch.eye(2), attention_bias=None,
            attention="nxn", pool_size=[1, 1], need_branches=False, dtype=None)
bad = dict(
    features=[[], [x[0]], x * 9, [x[0], x[1][0]], [x[0], x[1][:1]], [x[0], x[1].long()], [x[0], x[1].double()], [x[0], x[1][:, :, :0]], [x[0], x[1][:, :2]]],
    weight=[torch.randn(12), torch.randn(5, 11), torch.randn(0, 12), torch.randn(5, 12, 1), torch.ones(5, 12, dtype=torch.int32), torch.randn(5, 12).double()],
    bias=[torch.randn(5), torch.randn(3, 5), torch.randn(5, 2), torch.ones(2, 5, dtype=torch.long)],
    attention_weight=[None, torch.randn(2), torch.randn(3, 3), torch.tensor(1.0)],
    attention_bias=[torch.randn(1), torch.randn(5)],
    attention=["", "mean", "gated"],
    pool_size=[[0, 1], [-1, -1], [2, 2], [2**32, 2**32], [2**62, 1]],
    dtype=[torch.int32],
)
count = 0
with torch.inference_mode():
    raw(**good)
    for name, values in bad.items():
        for value in values:
            try:
                raw(**{**good, name: value})
            except RuntimeError as error:
                assert "interflow_head: " in str(error), error
                count += 1
            else:
                raise SystemExit(f"{name} = {value} did not raise")
    wide = [t.contiguous(memory_format=torch.channels_last) for t in x]
    for pool_size in ([2**32, 2**32], [2**63 - 1, 2]):  # products that do not fit into 64 bits
        for weight in (torch.randn(5, 0), torch.randn(5, 12)):
            try:
                raw(**{**good, "features": wide, "weight": weight, "pool_size": pool_size})
            except RuntimeError as error:
                assert "interflow_head: " in str(error), error
                count += 1
            else:
                raise SystemExit(f"pool_size {pool_size} did not raise")
    p, dy, dz = torch.randn(2, 12), torch.randn(2, 5), torch.randn(2, 2, 5)
    good = dict(dy=dy, dbranches=dz, pooled=p, weight=good["weight"], bias=good["bias"], attention_weight=torch.eye(2), attention_bias=None,
                attention="nxn", widths=[4, 8], feature_stages=[0, 1], need_weight=True, need_bias=True, need_attention=True)
    bad = dict(dy=[torch.randn(2, 4), torch.randn(5), torch.randn(3, 5)], dbranches=[torch.randn(2, 5), torch.randn(2, 5, 2)],
               pooled=[torch.randn(2, 11), torch.randn(12), p.double()], widths=[[], [12], [4, 9], [1] * 17, [-400000, 400012], [400012, -400000]],
               feature_stages=[[2], [-1]],
               weight=[torch.randn(5, 11)], attention=["x"], bias=[torch.randn(5)])
    back(**good)
    for name, values in bad.items():
        for value in values:
            try:
                back(**{**good, name: value})
            except RuntimeError as error:
                assert "interflow_head" in str(error), error
                count += 1
            else:
                raise SystemExit(f"backward {name} = {value} did not raise")
print(count)
"""


def test_malformed_raw_calls_raise_and_never_crash():
    done = subprocess.run([sys.executable, "-c", FUZZ], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert int(done.stdout) > 45
