"""Triton's kernels with every optional argument absent, of other dtypes, strides, alignments and sizes: each must compile; sums keep one order.

The interpreter skips code that a call does not reach. The compiler does not: it compiles both sides of an `if` on numbers, and what follows
a `return` or a first assignment inside a branch. No GPU is needed, and no memory: the tensors are on the device "meta".
"""

import re
from itertools import product

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from triton_offline import TARGETS, compiled, recorded, translated

from interflow_kernels.triton.interflow_head.backward import interflow_head_backward
from interflow_kernels.triton.interflow_head.forward import interflow_head
from interflow_kernels.triton.interflow_head.pool import interflow_pool
from interflow_kernels.triton.stage_end.backward import stage_end_backward
from interflow_kernels.triton.stage_end.forward import stage_end
from interflow_kernels.triton.stage_tap.backward import stage_tap_backward
from interflow_kernels.triton.stage_tap.forward import stage_tap

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
YES_NO = (True, False)
CLASSES, WIDTHS = 72, (40, 16)
ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated", "folded")
SOME_ATTENTIONS = [pytest.param(a, marks=[pytest.mark.slow] * (a in ("hard", "1xn", "folded"))) for a in ATTENTIONS]
# Sums over more than two of a tile's numbers, in an order that Triton chooses: of the kernels' own memory, dense and aligned, so that it is always the same.
OF_OWN_MEMORY = ("head_scores", "head_attention")


def empty(*shape, dtype=BF16, last=False):
    t = torch.empty(shape, dtype=dtype, device="meta")
    return t.to(memory_format=torch.channels_last) if last else t


def when(there, t):
    return t if there else None


def orders(text):
    """Of each sum of fp32 over an axis, how many numbers it adds."""
    found = []
    for piece in text.split('"tt.reduce"')[1:]:
        axis, body, shape, kind = re.search(r"<\{axis = (\d) : i32.*?\}> \(\{(.*?)\}\) : \(tensor<((?:\d+x)+)(\w+)", piece, re.S).groups()
        called = "tt.call @" in body and "sum" in body  # the sum's own addition, not inlined yet
        if kind == "f32" and ("arith.addf" in body or called):
            found.append(int(shape.split("x")[int(axis)]))
    return found


def check(seen, function, *arguments):
    """Every kernel of the call that is not in `seen` yet."""
    with recorded() as launches:
        function(*arguments)
    for launch in launches:
        key = launch.kernel, tuple(None if a is None else getattr(a, "dtype", 0) for a in launch.arguments), launch.constants
        if key not in seen:
            seen.add(key)
            text = translated(launch, TARGETS["sm_90"])
            assert launch.kernel.__name__ in OF_OWN_MEMORY or max(orders(text), default=0) <= 2, launch.kernel.__name__


# --- the stage tap and the stage end ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("last", YES_NO, ids=["channels_last", "contiguous"])
def test_tap(last):
    u, seen = empty(2, 20, 8, 12, last=last), set()
    for pool, shift, mask in product(YES_NO, (None, FP32, BF16), YES_NO):
        check(seen, stage_tap, u, None if shift is None else empty(20, dtype=shift), pool, mask)
    for pool in YES_NO:
        m, p, mask = stage_tap_results(u, pool)
        for dm, dp, dshift in product(YES_NO, YES_NO, YES_NO):
            check(seen, stage_tap_backward, when(dm and pool, m), when(dp, p), mask, u, pool, last, dshift)
    assert len(seen) > 20


def stage_tap_results(u, pool):
    with recorded():
        return stage_tap(u, None, pool, True)


@pytest.mark.parametrize("last", YES_NO, ids=["channels_last", "contiguous"])
def test_end(last):
    u, p, seen = empty(2, 20, 8, 12, last=last), empty(2, 20, dtype=FP32), set()
    for shift, residual, activation in product((None, FP32, BF16), YES_NO, ("relu", "none")):
        check(seen, stage_end, u, None if shift is None else empty(20, dtype=shift), when(residual, u), activation)
    for dv, dp, v, dshift in product(YES_NO, YES_NO, YES_NO, YES_NO):
        if dv or dp:
            check(seen, stage_end_backward, when(dv, u), when(dp, p), when(v, u), u, last, dshift)
    assert len(seen) > 20


# --- the head -----------------------------------------------------------------------------------------------------------------
def parameters(attention, bias, offset, dtype=BF16, widths=WIDTHS, classes=CLASSES):
    n = len(widths)
    weight = {"nxn": (n, n), "gated": (n, n), "classwise": (n, classes), "folded": None}.get(attention, (n,))
    bias_of = {"hard": None, "1xn": (1,), "nxn": (n,), "gated": (n,)}.get(attention, (classes,))
    return (
        empty(classes, sum(widths), dtype=dtype),
        when(bias, empty(n, classes, dtype=dtype)),
        None if weight is None else empty(*weight, dtype=dtype),
        empty(*bias_of, dtype=dtype) if bias_of and (offset or attention == "gated") else None,
    )


@pytest.mark.parametrize("attention", SOME_ATTENTIONS)
def test_head(attention):
    seen = set()
    maps = [[empty(2, c, s, s, last=last) for c, s in zip(WIDTHS, (8, 4), strict=True)] for last in YES_NO]
    for bias, offset, branches in product(YES_NO, YES_NO, YES_NO):
        check(seen, interflow_head, maps[0], *parameters(attention, bias, offset), attention, [1, 1], branches, None)
    for features in (maps[1], [empty(2, c, dtype=FP32) for c in WIDTHS], [empty(2, 40, dtype=FP32), maps[0][1]]):
        check(seen, interflow_head, features, *parameters(attention, True, True), attention, [1, 1], True, None)
    assert len(seen) >= 8


def backward(attention, dy, dz, bias, offset, stages, needs, dtype=BF16, batch=2, classes=CLASSES):
    given = when(dy, empty(batch, classes, dtype=dtype)), when(dz, empty(batch, len(WIDTHS), classes, dtype=dtype))
    pooled = empty(batch, sum(WIDTHS), dtype=FP32)
    return interflow_head_backward(*given, pooled, *parameters(attention, bias, offset, dtype, classes=classes), attention, WIDTHS, stages, *needs)


EVERY_NEED = list(product(YES_NO, repeat=3))
SOME = [([0, 1], (True, True, True)), ([], (True, True, True)), ([1], (False, False, True)), ([1], (False, False, False))]
EVERY = [(stages, needs) for stages in ([0, 1], [0], [1], []) for needs in EVERY_NEED]


def check_gradients(attention, cases):
    seen = set()
    for dy, dz, bias, offset, (stages, needs) in cases:
        if (dy or dz) and (stages or any(needs)):
            check(seen, backward, attention, dy, dz, bias, offset, stages, needs)
    return seen


@pytest.mark.parametrize("attention", SOME_ATTENTIONS)
def test_gradients(attention):
    """No bias, no offset; either upstream gradient; maps, parameters or both frozen."""
    both = [(dy, dz, True, True, case) for dy, dz in ((True, False), (True, True), (False, True)) for case in SOME]
    assert len(check_gradients(attention, [*both, (True, False, False, False, SOME[0]), (True, True, False, False, SOME[0])])) >= 10


@pytest.mark.parametrize("classes", [1, 10, 1000])
def test_gradients_by_tiles_of_other_sizes(classes):
    """A name that both branches of a kernel give a value must have one shape in both: tiles of classes and of images differ here."""
    seen = set()
    for attention, batch, dtype in (("classwise", 2, BF16), ("nxn", 40, FP32), ("gated", 300, BF16)):
        check(seen, backward, attention, True, True, True, True, [0, 1], (True, True, True), dtype, batch, classes)
    assert len(seen) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_combination_of_gradients(attention):
    assert len(check_gradients(attention, product(YES_NO, YES_NO, YES_NO, YES_NO, EVERY))) > 40


# --- other signatures: sizes of 1, mixed dtypes, strides, 64-bit offsets, addresses between 16 bytes ------------------------------
def strided(*shape, dtype=BF16):
    return empty(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]


def huge(last):
    """Of more than 2^31 numbers in one image."""
    return empty(1, 64, 8192, 8192, last=last)


OTHERS = {
    "one of each": lambda: interflow_head([empty(1, 1, 1, 1)], *parameters("nxn", True, True, widths=(1,), classes=1), "nxn", [1, 1], True, None),
    "adaptive windows": lambda: interflow_head(
        [empty(2, 5, 7, 6), empty(2, 4, 5, 5, last=True)], *parameters("nxn", True, True, widths=(30, 24)), "nxn", [2, 3], False, None
    ),
    "fp16 weights beside fp32 and bf16 maps": lambda: interflow_head(
        [empty(2, 40, 8, 8, dtype=FP32), empty(2, 16, 4, 4, last=True)], *parameters("gated", True, True, FP16), "gated", [1, 1], True, BF16
    ),
    "fp32 weights beside half maps": lambda: interflow_head(
        [empty(2, 40, 8, 8, dtype=FP16), empty(2, 16)], *parameters("classwise", True, True, FP32), "classwise", [1, 1], True, FP16
    ),
    "sixteen stages": lambda: interflow_head([empty(2, 3, 1, 2)] * 16, *parameters("nxn", True, True, widths=(3,) * 16), "nxn", [1, 1], False, None),
    "maps in parts": lambda: interflow_head(
        [empty(2, 64, 60, 60, last=True), empty(2, 2, 290, 300)], *parameters("nxn", True, True, widths=(64, 2)), "nxn", [1, 1], False, None
    ),
    "a pool of parts": lambda: interflow_pool([empty(2, 64, 60, 60, last=True), empty(2, 2, 290, 300, dtype=FP32), empty(2, 7)], [1, 1]),
    "fp16 gradients": lambda: backward("classwise", True, True, True, True, [1], (True, True, True), FP16, 3),
    "fp32 gradients of gates": lambda: backward("gated", True, True, True, True, [0, 1], (True, True, True), FP32, 1),
    "a strided gradient": lambda: interflow_head_backward(
        strided(2, CLASSES),
        empty(2, 1, CLASSES).expand(2, 2, CLASSES),
        empty(2, 56, dtype=FP32),
        *parameters("1xn", True, True),
        "1xn",
        WIDTHS,
        [0],
        *(True,) * 3,
    ),
    "a tap of one pixel": lambda: stage_tap(empty(1, 1, 1, 1), empty(1), True, True),
    "a tap in parts": lambda: stage_tap(empty(2, 40, 90, 91, dtype=FP16, last=True), None, False, True),
    "an end in parts": lambda: stage_end(empty(2, 40, 90, 91, dtype=FP32, last=True), empty(40, dtype=FP32), strided(2, 40, 90, 91, dtype=FP32), "relu"),
    "wide taps": lambda: [stage_tap(huge(last), empty(64), pool, True) for last, pool in product(YES_NO, YES_NO)],
    "wide ends": lambda: [stage_end(huge(last), empty(64), huge(not last), "relu") for last in YES_NO],
    "wide gradients of taps": lambda: [
        stage_tap_backward(
            when(pool, huge(last)[:, :, ::2, ::2]), empty(1, 64, dtype=FP32), stage_tap_results(huge(last), pool)[2], huge(last), pool, last, True
        )
        for last, pool in product(YES_NO, YES_NO)
    ],
    "wide gradients of ends": lambda: [stage_end_backward(huge(last), None, huge(last), huge(last), last, True) for last in YES_NO],
    "wide maps of a head": lambda: interflow_head([huge(True), huge(False)], *parameters("nxn", True, True, widths=(64, 64)), "nxn", [1, 1], False, None),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_signatures(name):
    seen = set()
    check(seen, OTHERS[name])
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in ("sixteen stages", "adaptive windows")])
def test_other_signatures_to_machine_code(name):
    """As far as the GPU's own code, of tensors that are aligned and of such that are not."""
    with recorded() as launches:
        OTHERS[name]()
    for launch in launches:
        for unaligned in ((), launch.kernel.arg_names):
            compiled(launch, TARGETS["sm_90"], unaligned)


# --- what the compiler makes of a sum -----------------------------------------------------------------------------------------
def test_a_sum_over_more_than_two_is_seen():
    """That `check` can fail: the gates' sums are such."""
    with recorded() as launches:
        backward("gated", True, False, True, True, [0], (True, True, True))
    scores = next(launch for launch in launches if launch.kernel.__name__ == "head_scores")
    assert max(orders(translated(scores, TARGETS["sm_90"]))) > 2


def layouts(text):
    """Of each sum over more than two numbers of fp32: axis, shape, and which thread holds which of them."""
    names, found = dict(re.findall(r"^(#\w+) = (.*)$", text, re.M)), []
    for piece in text.split('"tt.reduce"')[1:]:
        axis, body, shape, layout = re.search(r"<\{axis = (\d) : i32.*?\}> \(\{(.*?)\}\) : \(tensor<((?:\d+x)+)\w+, (.*?)>\) ->", piece, re.S).groups()
        if "arith.addf" in body and int(shape.split("x")[int(axis)]) > 2:
            found.append((axis, shape, re.sub(r"#\w+", lambda name: names.get(name[0], name[0]), layout)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["nxn", "classwise", "gated"])
def test_sums_of_own_memory_have_one_order(attention):
    """Their layout does not depend on the strides and the alignment of what a caller gives."""
    found = []
    for dy in (empty(2, CLASSES), strided(2, CLASSES), empty(CLASSES, 2).t(), empty(1, CLASSES).expand(2, CLASSES)):
        with recorded() as launches:
            given = dy, empty(2, 2, CLASSES), empty(2, 56, dtype=FP32), *parameters(attention, True, True)
            interflow_head_backward(*given, attention, WIDTHS, [0], True, True, True)
        for launch, unaligned in product(launches, ((), ("dy", "dbranches", "weight", "bias"))):
            if launch.kernel.__name__ in OF_OWN_MEMORY:
                found.append((launch.kernel.__name__, layouts(compiled(launch, TARGETS["sm_90"], unaligned).asm["ttgir"])))
    for name in OF_OWN_MEMORY:
        each = [each for kernel, each in found if kernel == name]
        assert all(e == each[0] for e in each), name
    assert any(each for _, each in found) or attention == "classwise"


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_matrix_units_add_no_other_sum_to_the_largest_parts_product(dtype):
    """Triton turns `a b + c` into one operation of the units, which cut c off. So the largest parts' product must begin at zero."""
    with recorded() as launches:
        backward("nxn", True, False, True, True, [0], (True, False, False), dtype)
    text = compiled(launches[0], TARGETS["sm_90"]).asm["ttir"]
    zeros = set(re.findall(r"(%\w+) = arith\.constant dense<0\.0+e\+00> : tensor<\d+x\d+xf32", text))
    accumulators = re.findall(r"tt\.dot %\w+, %\w+, (%\w+)", text)
    count, begun = {FP32: (6, 3), FP16: (5, 3), BF16: (3, 2)}[dtype]  # products of parts; of which begin at zero, one or two chains of small ones among them
    assert len(accumulators) == 6 + count  # dW's, of fp32 both, and dp's
    assert sum(c in zeros for c in accumulators) == 3 + begun
