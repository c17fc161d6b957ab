"""The CUDA head in the host emulation: the CPU suite's own checks with the emulated operators in place of the compiled ones."""

import sys

import cuda_emulation
import pytest
import test_interflow_head as suite
import torch
from cuda_emulation import Edit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from interflow_kernels import FusedInterflowHead, ops
from interflow_kernels.testing import ATTENTIONS, LAYOUTS, HeadCase, gradients, head_inputs, in_layout

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = (1, 2, 7)
SMALL = ((5, 6, 5), (32, 5, 5), (7, 3, 4))


@pytest.fixture(scope="module")
def library():
    return cuda_emulation.load(cuda_emulation.operator_sources())


def use(monkeypatch, library) -> list[str]:
    """Puts a library's operators in place of the compiled ones; the list grows by the name of each that is called."""
    called: list[str] = []

    def noted(name):
        operator = getattr(library.ops, name).default

        def run(*arguments):
            called.append(name)
            return operator(*arguments)

        return run

    module = sys.modules[ops.interflow_head.__module__]
    for name in ("interflow_head", "interflow_head_backward"):
        monkeypatch.setattr(module, f"raw_{name}", noted(name))
    monkeypatch.setattr(suite, "raw_head", noted("interflow_head"))
    return called


@pytest.fixture
def run_with(library, monkeypatch):
    """The package's head on the emulated operators; a call of what it gives chooses grid size and order. They must have been called."""
    called = use(monkeypatch, library)

    def choose(blocks: int, seed: int = 0) -> None:
        with cuda_emulation.emulated(library, blocks, seed):
            pass

    choose(7)
    yield choose
    assert "interflow_head" in called


# --- the CPU suite's matrix ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_modes_dtypes_layouts(run_with, attention, dtype, layout):
    for blocks in GRIDS:
        run_with(blocks, seed=blocks)
        suite.check(HeadCase(attention=attention, dtype=dtype, layout=layout, maps=SMALL, classes=9))


@pytest.mark.parametrize("use", [("y",), ("branches",), ("y", "branches")], ids="+".join)
@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True)], ids=["none", "bias", "attention_bias"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_gradient_may_be_missing_and_biases_too(run_with, attention, biases, use):
    suite.check(HeadCase(attention=attention, bias=biases[0], attention_bias=biases[1], maps=SMALL), use=use)


@pytest.mark.parametrize("pool_size", [(2, 3), (7, 1), (13, 9)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "cropped", "sliced", "permuted"])
def test_adaptive_windows(run_with, pool_size, layout):
    suite.check(HeadCase(batch=2, pool_size=pool_size, layout=layout, dtype=torch.bfloat16, maps=((5, 13, 9), (16, 7, 7), (33, 4, 1)), classes=3), use=("y",))


@pytest.mark.parametrize("classes", [1, 7, 8, 9, 33, 100])
@pytest.mark.parametrize("batch", [1, 15, 17, 40])
def test_tiles_and_groups(run_with, batch, classes):
    for dtype in (torch.float32, torch.bfloat16):
        suite.check(HeadCase(batch=batch, classes=classes, attention="classwise", maps=((16, 2, 2), (40, 1, 2)), dtype=dtype), use=("y",))
    suite.check(HeadCase(batch=batch, classes=classes, attention="gated", maps=((16, 2, 2), (40, 1, 2))), use=("y",))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "maps",
    [
        ((16, 48, 48), (8, 70, 70)),  # parts that meet, in both layouts
        ((1, 1, 1), (1, 40, 1), (1, 1, 40)),
        ((3, 5, 7),) * 16,
        ((130, 1, 1), (260, 2, 9), (16, 1, 33)),
        ((2, 130, 131),),
        ((128, 4, 4), (256, 2, 2)),  # whole blocks of columns, 16-byte loads
    ],
    ids=["parts", "ones", "sixteen", "rows", "plane", "aligned"],
)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_shapes(run_with, maps, layout, dtype):
    suite.check(HeadCase(batch=2, maps=maps, layout=layout, dtype=dtype, classes=5))


@pytest.mark.parametrize("channels", range(1, 34, 3))
def test_channel_counts(run_with, channels):
    for layout in ("contiguous", "channels_last"):
        for dtype in DTYPES:
            suite.check(HeadCase(batch=1, classes=3, attention="1xn", maps=((channels, 5, 4), (channels, 1, 1)), layout=layout, dtype=dtype), use=("y",))


sizes = st.integers(1, 17)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    maps=st.lists(st.tuples(st.integers(1, 40), sizes, sizes), min_size=1, max_size=4),
    batch=st.integers(1, 20),
    classes=st.integers(1, 40),
    attention=st.sampled_from(ATTENTIONS),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    pool_size=st.sampled_from([(1, 1), (1, 1), (2, 2), (3, 1)]),
    blocks=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_any_shape(run_with, maps, batch, classes, attention, layout, dtype, pool_size, blocks, seed):
    run_with(blocks, seed)
    suite.check(HeadCase(batch, tuple(maps), classes, attention, pool_size, layout=layout, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_features_and_mixed_dtypes(run_with, dtype):
    suite.test_pooled_features(dtype)
    suite.test_nhwc_and_tokens(dtype)
    if dtype == torch.float32:
        suite.test_pooled_beside_maps()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_suite_of_gradients(run_with, attention):
    suite.test_each_gradient_alone_is_the_same_to_the_bit(attention)
    if attention in ("classwise", "gated"):
        suite.test_strides_of_upstream_gradients_and_parameters_do_not_matter(attention)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_special_values_propagate(run_with, attention, layout, value):
    for dtype in DTYPES:
        suite.test_special_values_propagate(attention, dtype, layout, value)


def test_empty_batch(library, monkeypatch):
    use(monkeypatch, library)
    suite.test_empty_batch("nxn")


# --- addresses ----------------------------------------------------------------------------------------------------------
def shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """x in memory that begins `by` elements later than an aligned address."""
    memory = x.new_empty(x.numel() + 16)
    return torch.as_strided(memory, x.shape, x.stride(), by).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_do_not_depend_on_addresses(run_with, layout, dtype):
    case = HeadCase(batch=3, maps=((32, 6, 8), (16, 3, 3)), layout=layout, dtype=dtype)
    head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
    with torch.no_grad():
        first = head(maps)
        for by in (1, 2, 4):
            assert torch.equal(first, head([shifted(x, by) for x in maps]))
            moved = FusedInterflowHead.from_eager(case.head())
            moved.weight = torch.nn.Parameter(shifted(head.weight, by))
            assert torch.equal(first, moved(maps))


# --- bits ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_bits_do_not_depend_on_grid_order_or_batch(run_with, attention, layout, dtype):
    case = HeadCase(batch=37, maps=((16, 9, 9), (40, 4, 4)), classes=50, attention=attention, layout=layout, dtype=dtype)
    head, maps, dy = FusedInterflowHead.from_eager(case.head()), head_inputs(case), torch.randn(37, 50).to(dtype)

    def run(chosen):
        outputs, grads = gradients(head, [in_layout(x[chosen], layout) for x in maps], dy[chosen], None)
        return [outputs["y"], outputs["branches"], grads["features[0]"], grads["features[1]"]], [g for g in grads.values() if g is not None]

    whole, whole_grads = run(torch.arange(37))
    for blocks in GRIDS:
        for seed in range(2):
            run_with(blocks, seed)
            again, grads = run(torch.arange(37))
            assert all(torch.equal(a, b) for a, b in zip([*whole, *whole_grads], [*again, *grads], strict=True))
    for chosen in ([36], [3, 36, 0, 9, 12], list(range(20))):
        for a, b in zip(whole, run(torch.tensor(chosen))[0], strict=True):
            assert torch.equal(a[chosen], b)


def test_forward_and_forward_branches_agree_to_the_bit(run_with):
    for attention in ATTENTIONS:
        for dtype in DTYPES:
            case = HeadCase(batch=18, attention=attention, dtype=dtype, maps=SMALL, classes=40)
            head, maps = FusedInterflowHead.from_eager(case.head()), head_inputs(case)
            with torch.no_grad():
                assert torch.equal(head(maps), head.forward_branches(maps)[0])


# --- refusals -----------------------------------------------------------------------------------------------------------
def test_fp64_is_refused_by_name(library):
    with pytest.raises(RuntimeError, match=r"interflow_head: fp64 has no CUDA kernel.*features\[0\] in fp64"):
        library.ops.interflow_head([torch.randn(1, 2, 3, 3, dtype=torch.float64)], torch.randn(2, 2), None, None, None, "folded", [1, 1], False, None)
    with pytest.raises(RuntimeError, match=r"fp64 has no CUDA kernel.*weight in fp64"):
        library.ops.interflow_head([torch.randn(1, 2)], torch.randn(2, 2, dtype=torch.float64), None, None, None, "folded", [1, 1], False, None)


# --- mistakes that must be caught ---------------------------------------------------------------------------------------
POOL, FORWARD, SCHEDULE = "csrc/interflow_head/cuda/pool.cuh", "csrc/interflow_head/cuda/forward.cu", "csrc/interflow_head/cuda/schedule.h"
STORED = "    for (int n = 0; n < N; ++n) place[n] = sums[n];\n  }\n"
RELEASE = "release(%s, 1)"
MEANS = "P.counters + P.schedule.done_counter(ticket.group)"
SETTLE = "    settle(P, before, scratch, flag);  // before this block waits itself: others may wait for it\n"
TURNS = "return r < units ? Ticket{true, g + 1, r} : Ticket{false, g, r - units};"
TURNED = "return r < tiles ? Ticket{false, g + 1, r} : Ticket{true, g + 1, r - tiles};"
REDUCTION = "bool last = atomic_add_%s(unit.counter, 1)"
ORDER = r"block \d+ thread \d+: .*no release and acquire order"
FORWARD_FILES = ("library.cpp", "common/cuda/host.cpp", "interflow_head/cuda/forward.cpp", "interflow_head/cuda/forward.cu")
MISTAKES = {
    "a barrier": (Edit(POOL, STORED + "  __syncthreads();", STORED), r"block \d+ thread \d+: .*(never written|no barrier orders the two)"),
    "the release of a whole unit": (
        Edit(POOL, f"atomic_add_{RELEASE % 'unit.counter'}", f"atomic_add_{RELEASE % 'unit.counter'}".replace("release", "relaxed")),
        ORDER,
    ),
    "the release of means": (Edit(POOL, f"atomic_add_{RELEASE % MEANS}", f"atomic_add_{RELEASE % MEANS}".replace("release", "relaxed")), ORDER),
    "a unit that nobody is notified of": (Edit(FORWARD, SETTLE, ""), r"block \d+ thread \d+: .*(deadlock|wait|for ever)"),
    "the order of tickets": (Edit(SCHEDULE, TURNS, TURNED), r"block \d+ thread \d+: .*(deadlock|wait|for ever)"),
    "a counter left dirty": (Edit(FORWARD, "    store_relaxed(P.counters + HeadSchedule::kNext, 0);\n", ""), "counter 0 is .* must be zero again"),
    "a reduction's acquire": (Edit(POOL, REDUCTION % "acq_rel", REDUCTION % "release"), ORDER),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake, monkeypatch):
    edit, sentence = MISTAKES[mistake]
    mutant = cuda_emulation.load(cuda_emulation.sources(*FORWARD_FILES), edits=[edit])
    case = HeadCase(batch=50, maps=((16, 48, 48), (8, 3, 3)), layout="channels_last", classes=9)
    head, maps = case.head(), head_inputs(case)
    with cuda_emulation.emulated(mutant, 3, 0), pytest.raises(RuntimeError, match=sentence):
        mutant.ops.interflow_head(maps, head.weight, head.bias, head.attention_weight, None, "nxn", [1, 1], False, None)
