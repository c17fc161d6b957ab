"""Arguments of every wrong kind, of every public function, module and raw operator: one sentence with argument, what was expected and what came."""

import numpy as np
import pytest
import torch

from interflow_kernels import AuxiliaryHeads, FoldedInterflowHead, FusedInterflowHead, InterflowHead, StageTap, backend, interflow_head, stage_tap

X, W, B, A = torch.randn(2, 3, 4, 4), torch.randn(5, 3), torch.randn(1, 5), torch.ones(1)
RAW = torch.ops.interflow_kernels
GOOD = {"features": [X], "weight": W, "bias": B, "attention_weight": A, "attention_bias": torch.zeros(1), "attention": "1xn"}


def nested(t, layout=torch.strided):
    return torch.nested.nested_tensor([t, t], layout=layout)


def one_sentence(kinds, call, *parts):
    with pytest.raises(kinds) as error:
        call()
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 300
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


# --- what is no tensor, and what is no dense one -----------------------------------------------------------------------------
NO_TENSORS = [([[1.0]], "list"), (0.5, "float"), (np.ones((5, 3), np.float32), "ndarray"), ("w", "str")]
TENSORS = ["weight", "bias", "attention_weight", "attention_bias"]


@pytest.mark.parametrize(("value", "kind"), NO_TENSORS, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("name", TENSORS)
def test_parameters_that_are_no_tensors(name, value, kind):
    one_sentence(TypeError, lambda: interflow_head(**{**GOOD, name: value}), f"{name} must be a tensor", f"got {kind}")


def test_a_missing_weight():
    one_sentence(TypeError, lambda: interflow_head(**{**GOOD, "weight": None}), "weight must be a tensor, got NoneType")


NOT_DENSE = {
    "sparse": (lambda t: t.to_sparse(), "torch.sparse_coo"),
    "csr": (lambda t: t.to_sparse_csr() if t.dim() == 2 else t.to_sparse(), "torch.sparse_"),
    "mkldnn": (lambda t: t.to_mkldnn(), "torch._mkldnn"),
    "nested": (nested, "nested"),
    "jagged": (lambda t: nested(t, torch.jagged), "nested"),
    "quantized": (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8), "quint8"),
}
OTHER_DTYPES = {
    "fp8": (lambda t: t.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    "complex": (lambda t: t.to(torch.complex64), "complex64"),
    "integer": (lambda t: t.long(), "int64"),
}
WRONG = pytest.mark.parametrize("make", [pytest.param(v, id=k) for k, v in {**NOT_DENSE, **OTHER_DTYPES}.items()])


@pytest.mark.filterwarnings("ignore")
@WRONG
@pytest.mark.parametrize("name", TENSORS)
def test_parameters_of_other_kinds(name, make):
    one_sentence(TypeError, lambda: interflow_head(**{**GOOD, name: make[0](GOOD[name])}), f"{name} must ", make[1])


@pytest.mark.filterwarnings("ignore")
@WRONG
@pytest.mark.parametrize("name", ["auto", "eager"])
def test_maps_of_other_kinds(name, make):
    wrong, part = make[0](X), make[1]
    nhwc = make[0](X.permute(0, 2, 3, 1).contiguous())
    with backend(name):
        one_sentence(TypeError, lambda: interflow_head(**{**GOOD, "features": [wrong]}), "features[0] must ", part)
        one_sentence(TypeError, lambda: interflow_head(**{**GOOD, "features": [nhwc], "layout": "NHWC"}), "features[0] must ", part)
        one_sentence(TypeError, lambda: stage_tap(wrong), "u must ", part)
        one_sentence(TypeError, lambda: StageTap()(X, make[0](torch.ones(3))), "shift must ", part)
        for head in (InterflowHead, FusedInterflowHead, AuxiliaryHeads):
            one_sentence(TypeError, lambda head=head: head((3,), 5)([wrong]), "features[0] must ", part)
        one_sentence(TypeError, lambda: InterflowHead((3,), 5).fold()([wrong]), "features[0] must ", part)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [pytest.param(v, id=k) for k, v in NOT_DENSE.items() if k != "jagged"])  # a Python subclass: torch's own refusal
@pytest.mark.parametrize("grad", [False, True], ids=["plain", "grad"])
def test_raw_operators_refuse_what_is_not_dense(make, grad):
    wrong, part = make
    weight = W.clone().requires_grad_(grad)
    p, mask = X.mean((2, 3)), torch.zeros(24, dtype=torch.uint8)
    head = ("1xn", [1, 1], False, None)
    one_sentence(RuntimeError, lambda: RAW.interflow_head([wrong(X)], weight, None, A, None, *head), "interflow_head: features[0] must ", part)
    one_sentence(RuntimeError, lambda: RAW.interflow_head([X.requires_grad_(grad)], wrong(W), None, A, None, *head), "interflow_head: weight must ", part)
    back = ("1xn", [3], [0], True, True, True)
    one_sentence(RuntimeError, lambda: RAW.interflow_head_backward(wrong(torch.ones(2, 5)), None, p, W, None, A, None, *back), "dy must ", part)
    one_sentence(RuntimeError, lambda: RAW.interflow_head_backward(torch.ones(2, 5), None, wrong(p), W, None, A, None, *back), "pooled must ", part)
    one_sentence(RuntimeError, lambda: RAW.stage_tap(wrong(X), None, True, True), "stage_tap: u must ", part)
    one_sentence(RuntimeError, lambda: RAW.stage_tap_backward(wrong(torch.ones(2, 3, 2, 2)), None, mask, X, True, False, True), "dm must ", part)


def test_raw_operators_on_two_devices():
    meta = "meta"
    one_sentence(
        RuntimeError,
        lambda: RAW.interflow_head([X], W.to(meta), None, A, None, "1xn", [1, 1], True, None),
        "weight must be on the device of features[0], cpu, got meta",
    )
    one_sentence(RuntimeError, lambda: RAW.stage_tap(X, torch.ones(3).to(meta), True, True), "shift must be on the device of u, cpu, got meta")
    y, _, pooled = raw_head(X.to(meta), W.to(meta), A.to(meta))
    assert (tuple(y.shape), tuple(pooled.shape)) == ((2, 5), (2, 3))


HUGE = torch.zeros(())
P, DY, MASK = X.mean((2, 3)), torch.ones(2, 5), torch.zeros(24, dtype=torch.uint8)


def raw_head(x=X, weight=W, attention_weight=A, pool=(1, 1), dtype=None):
    return RAW.interflow_head([x], weight, None, attention_weight, None, "1xn", list(pool), True, dtype)


def raw_back(dy=DY, pooled=P, weight=W, attention_weight=A, widths=(3,), stages=(0,)):
    return RAW.interflow_head_backward(dy, None, pooled, weight, None, attention_weight, None, "1xn", list(widths), list(stages), True, True, True)


TWICE = dict(pooled=torch.ones(2, 6), weight=torch.ones(5, 6), attention_weight=torch.ones(2), widths=(3, 3), stages=(0, 0))
RAW_CALLS = [
    (lambda: raw_head(weight=None), "interflow_head: weight must be a tensor, got None"),
    (lambda: raw_head(pool=(2**62, 2**62)), "interflow_head: pool_size must give fewer than 2^63"),
    (lambda: raw_head(pool=(0, 1)), "pool_size must be two numbers of at least 1, got [0, 1]"),
    (lambda: raw_head(dtype=torch.float8_e4m3fn), "interflow_head: dtype must be fp32, fp64, bf16 or fp16"),
    (lambda: raw_head(attention_weight=A.long()), "interflow_head: attention_weight must be fp32"),
    (lambda: raw_head(HUGE.expand(2**40, 3, 1, 1)), "no memory for a result of shape [1099511627776, 3]"),
    (lambda: raw_head(weight=HUGE.expand(2**50, 3)), "no memory for a contiguous copy of weight"),
    (lambda: raw_back(**TWICE), "feature_stages must be different ones of 0 to 1, got [0, 0]"),
    (lambda: raw_back(dy=DY.long()), "dy must be fp32"),
    (lambda: raw_back(pooled=P.bfloat16()), "pooled must be [B, 3] in Float"),
    (lambda: RAW.stage_tap(None, torch.ones(3), True, True), "stage_tap: u must be a tensor, got None"),
    (lambda: RAW.stage_tap_backward(None, None, None, X, True, False, True), "stage_tap_backward: mask must be a tensor, got None"),
    (lambda: RAW.stage_tap_backward(torch.ones(2, 3, 2, 2), None, MASK[:12], X, False, False, True), "dm must be None where max_pool is False"),
]


@pytest.mark.parametrize(("call", "part"), RAW_CALLS, ids=lambda v: v if isinstance(v, str) else "")
def test_raw_operators(call, part):
    with torch.inference_mode():
        one_sentence(RuntimeError, call, part)


# --- sizes, switches and names ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [True, 1.5, "2", None, (2, 2, 2), (1, True), np.float32(1), np.array([1, 2]), [], torch.ones(2)])
def test_pool_size(size):
    one_sentence(TypeError, lambda: interflow_head(**GOOD, pool_size=size), "pool_size must be an int or a pair of ints, got ")
    one_sentence(TypeError, lambda: FusedInterflowHead((3,), 5, pool_size=size), "pool_size must be an int or a pair of ints, got ")


def test_numpy_integers_are_sizes():
    head = FusedInterflowHead((np.int64(3), np.int32(4)), np.int64(5), pool_size=np.int64(2), hard_weights=np.ones(2, np.float32), attention="hard")
    assert (head.in_channels, head.num_classes, head.pool_size, head.hard_weights) == ((3, 4), 5, (2, 2), (1.0, 1.0))
    assert {type(v) for v in (*head.in_channels, head.num_classes, *head.pool_size)} == {int}
    assert head.branch_weight(np.int64(1)).shape == (5, 16)
    weight = torch.randn(5, 12)
    expected = interflow_head(**{**GOOD, "weight": weight}, pool_size=2)
    for pool in (np.int64(2), (np.int8(2), 2)):
        assert torch.equal(interflow_head(**{**GOOD, "weight": weight}, pool_size=pool), expected)
    assert FusedInterflowHead((3,), 5, bias=np.False_).bias is None


FLAGS = ["yes", None, 1, 0, [], 0.5, torch.tensor(True), np.array([True])]


@pytest.mark.parametrize("value", FLAGS, ids=repr)
def test_switches(value):
    folded = InterflowHead((3,), 5).fold()
    for name, call in {
        "return_branches": lambda: interflow_head(**GOOD, return_branches=value),
        "max_pool": lambda: stage_tap(X, max_pool=value),
        "max_pool ": lambda: StageTap(max_pool=value),
        "bias": lambda: InterflowHead((3,), 5, bias=value),
        "attention_bias": lambda: InterflowHead((3,), 5, attention_bias=value),
        "fused": lambda: FoldedInterflowHead((3,), folded.weight, folded.bias, fused=value),
    }.items():
        one_sentence(TypeError, call, f"{name.strip()} must be True or False, got ")


@pytest.mark.parametrize("value", [[], 3, None, b"nxn", np.array(["nxn", "hard"]), ("nxn",), "n" * 500, {}])
def test_names(value):
    one_sentence(ValueError, lambda: interflow_head(**{**GOOD, "attention": value}), "attention must be one of 'hard'")
    one_sentence(ValueError, lambda: InterflowHead((3,), 5, value), "attention must be one of 'hard'")

    def enter():
        with backend(value):
            pass

    one_sentence(ValueError, enter, "backend must be one of 'auto'")


NO_LAYOUTS = [(v, TypeError) for v in (1, None, b"NCHW", {"NCHW"}, torch.strided, np.array(["NCHW"]))] + [(v, ValueError) for v in ([1], [None], "", [])]


@pytest.mark.parametrize(("value", "kind"), NO_LAYOUTS, ids=repr)
def test_layout(value, kind):
    one_sentence(kind, lambda: interflow_head(**GOOD, layout=value), "layout must be ")
    one_sentence(kind, lambda: AuxiliaryHeads((3,), 5, layout=value), "layout must be ")


CONSTRUCTION = [
    (dict(in_channels=[2**62, 2**62]), ValueError, "fewer than 2^60 numbers"),
    (dict(in_channels=(3, "4")), TypeError, "in_channels must be a sequence of ints, got '4' in it"),
    (dict(in_channels=(True,)), TypeError, "in_channels must be a sequence of ints"),
    (dict(num_classes=True), TypeError, "num_classes must be an int, got True"),
    (dict(dtype=torch.float8_e4m3fn), TypeError, "dtype must be floating point, fp32, fp64, bf16 or fp16"),
    (dict(dtype="float32"), TypeError, "dtype must be a torch.dtype"),
    (dict(device="nowhere"), ValueError, "device must be one that torch knows"),
    (dict(device=1.5), ValueError, "device must be one that torch knows"),
]
HARD = [
    (3.0, TypeError, "sequence of 2 numbers"),
    ("ab", TypeError, "sequence of 2 numbers"),
    (torch.ones(2, 2), ValueError, "got shape (2, 2)"),
    (torch.ones(2, device="meta"), ValueError, "meta"),
    (torch.ones(2).to_sparse(), TypeError, "dense"),
    ([1.0, None], TypeError, "numbers, got None"),
    (torch.ones(2, dtype=torch.complex64), TypeError, "numbers"),
]


@pytest.mark.parametrize(("arguments", "kind", "part"), CONSTRUCTION, ids=lambda v: v if isinstance(v, str) else "")
def test_construction(arguments, kind, part):
    for head in (InterflowHead, FusedInterflowHead, AuxiliaryHeads):
        one_sentence(kind, lambda head=head: head(**{"in_channels": (3, 4), "num_classes": 5, **arguments}), part)


@pytest.mark.parametrize(("value", "kind", "part"), HARD, ids=lambda v: v if isinstance(v, str) else "")
def test_hard_weights(value, kind, part):
    one_sentence(kind, lambda: InterflowHead((3, 4), 5, "hard", hard_weights=value), "hard_weights must be", part)


def test_other_modules():
    w, b = torch.randn(5, 3), torch.randn(5)
    for arguments, part in (
        ((w.tolist(), b), "weight must be a tensor, got list"),
        ((w, None), "bias must be a tensor, got NoneType"),
        ((w.to_sparse(), b), "weight must be a dense tensor"),
        ((w, b.double()), "bias must have the dtype of weight"),
        ((w.long(), b), "weight must be floating point"),
    ):
        one_sentence(TypeError, lambda arguments=arguments: FoldedInterflowHead((3,), *arguments), part)
    one_sentence(ValueError, lambda: FoldedInterflowHead((3,), w[:0], b[:0]), "at least one class")
    one_sentence(ValueError, lambda: FoldedInterflowHead((1,) * 17, torch.ones(5, 17), b), "in_channels must name 1 to 16 stages")
    one_sentence(TypeError, lambda: FusedInterflowHead.from_eager(torch.nn.Linear(2, 3)), "head must be an InterflowHead, got Linear")
    one_sentence(TypeError, lambda: InterflowHead((3,), 5).branch_weight(1.0), "i must be an int, got 1.0")
    for value in ("x", None, True, [1.0]):
        one_sentence(TypeError, lambda value=value: AuxiliaryHeads((3,), 5, value), "weight must be a finite number of at least 0")
    heads, branches = AuxiliaryHeads((3, 4), 5), torch.randn(2, 2, 5)
    for target in (torch.tensor([0]), torch.zeros(2, 4), torch.zeros(2), torch.tensor([0, 1], device="meta")):
        one_sentence(ValueError, lambda target=target: heads.loss(branches, target), "target must be ")
    one_sentence(ValueError, lambda: heads.loss(torch.zeros(()).expand(2, 2**40, 5), torch.tensor([0, 1])), "branches must be [B, n, K] with n = 2 and K = 5")
    one_sentence(TypeError, lambda: heads.loss(branches, [0, 1]), "target must be a tensor, got list")
    one_sentence(TypeError, lambda: heads.loss([0, 1], branches), "branches must be a tensor, got list")


def test_maps_without_channels_have_a_gradient():
    x, weight = torch.ones(2, 0, 4, 4, requires_grad=True), torch.ones(5, 0, requires_grad=True)
    for pool in (1, 2):
        interflow_head([x], weight, None, torch.ones(1), attention="1xn", pool_size=pool).sum().backward()
        assert (x.grad.shape, weight.grad.shape) == (x.shape, weight.shape)
    for name in ("auto", "eager"):
        with backend(name):
            m, p = stage_tap(torch.ones(2, 0, 4, 4))
        assert (m.shape, p.shape) == ((2, 0, 2, 2), (2, 0))


def test_nan_reaches_the_attention_of_a_stage_without_columns():
    """dA = sum of dy * Z, and Z of such a stage is 0."""
    dy = torch.full((2, 5), float("nan"))
    for bias in (None, torch.ones(2, 5)):
        *_, daw, _ = RAW.interflow_head_backward(dy, None, torch.ones(2, 3), W, bias, torch.ones(2), None, "1xn", [3, 0], [], False, False, True)
        assert daw.isnan().all()
