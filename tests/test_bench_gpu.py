"""The benchmarks' cases on a GPU, as far as they go without one: which, with which goals, each built and checked on tiny maps."""

import inspect
import itertools
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bench_modules import CPU, case, gate, goals, made_case, roofline, room, run

networks, peers = room("networks"), room("harness.peers")
GPU = torch.device("cuda", 0)
MODULES = ("bench_head", "bench_stage_tap", "bench_train_step", "bench_triton")
PASSES = ("forward keeping masks", "backward")


# --- which cases, which goals -------------------------------------------------------------------------------------------
def planned(module):
    """A GPU's cases, which nobody builds."""
    return list(room(module).plans(False, GPU))


def test_every_case_of_the_design_is_planned():
    names = {module: [plan.name for plan in planned(module)] for module in MODULES}
    for layout in ("nchw", "channels_last"):
        for batch in (1, 8, 32, 128, 256):
            assert f"head, forward bf16 {layout} B={batch}" in names["bench_head"]
        for batch in (128, 512, 2048):
            assert f"head, forward bf16 {layout} B={batch} 32px K=10" in names["bench_head"]
        assert f"head, forward+backward bf16 {layout} B=32" in names["bench_head"]
        for direction in PASSES:
            assert f"tap, five boundaries, {direction} bf16 {layout} B=32 with shift" in names["bench_stage_tap"]
    for direction in ("inference", "training step"):
        for name in (f"vgg16, {direction}, 224px bf16 channels_last B=32", f"vgg16_bn, {direction}, 224px bf16 channels_last B=32"):
            assert name in names["bench_train_step"]
        assert f"vgg16, {direction}, 224px bf16 channels_last B=32 compiled" in names["bench_train_step"]
    for cell in ("B=1", "B=128"):
        assert {f"vgg16, {direction}, 224px bf16 channels_last {cell}" for direction in ("inference", "training step")} <= set(names["bench_train_step"])
    for cell in ("224px bf16 nchw B=32", "224px autocast channels_last B=32", "32px bf16 channels_last B=128", "32px bf16 channels_last B=2048"):
        assert f"vgg16, training step, {cell}" in names["bench_train_step"]
    for layout, batch in itertools.product(("nchw", "channels_last"), (32, 128)):
        cases = (f"head, forward bf16 {layout} B={batch}", *(f"tap, five boundaries, {p} bf16 {layout} B={batch} with shift" for p in PASSES))
        assert {f"{name} beside Triton" for name in cases} <= set(names["bench_triton"])
    assert "head, host time of a call, tiny inputs" in names["bench_head"]
    everything = [name for module in MODULES for name in names[module]]
    assert len(set(everything)) == len(everything)


def test_the_full_set_is_the_whole_grid_of_networks_and_holds_the_quick_one():
    full = {plan.name: plan for plan in room("bench_train_step").plans(True, GPU)}
    shapes = [(224, b) for b in (1, 8, 32, 128, 256)] + [(32, b) for b in (128, 512, 2048)]
    for model, direction, (pixels, batch), dtype, layout, how in itertools.product(
        ("vgg16", "vgg16_bn"), ("inference", "training step"), shapes, ("bf16", "autocast"), ("nchw", "channels_last"), ("", " compiled")
    ):
        providers = full[f"{model}, {direction}, {pixels}px {dtype} {layout} B={batch}{how}"].providers
        assert {"Interflow fused", "plain"} <= set(providers)
        quick = how and (model, pixels, batch, dtype, layout) == ("vgg16", 224, 32, "bf16", "channels_last")
        assert "Interflow naive" in providers or quick
    assert len(full) == 2 * 2 * 8 * 2 * 2 * 2 + 1  # and one in replayed graphs
    for module in MODULES:
        names = [plan.name for plan in room(module).plans(True, GPU)]
        assert len(set(names)) == len(names) and {plan.name for plan in planned(module)} <= set(names)


def test_limits_of_the_same_run_and_missing_engines_are_in_every_head_case():
    for plan in planned("bench_head"):
        if plan.name.startswith("head, forward"):
            assert {"ours", "eager", "compiled", "read", "copy", "launch"} <= set(plan.providers)
    with pytest.raises(case.Unavailable, match="torch_tensorrt is not installed"):
        peers.tensorrt(lambda x: x)


def measured(**seconds):
    kinds = {"ours": "ours", "eager": "peer", "compiled": "peer", "plain": "base", "copy": "limit"}
    return goals.Measured({n: [t] * 9 for n, t in seconds.items()}, kinds, 50, {"copy": 200}, {"ours": 10, "eager": 150}, {"ours": 35, "plain": 44})


def test_goals_of_the_gpu():
    taken = measured(ours=8e-6, eager=80e-6, compiled=30e-6, copy=24e-6, plain=10e-6)
    assert [g.judge(taken, "ours")["reached"] for g in goals.gpu_head(224, "channels_last", 1)] == [True, False, True]  # 10x >= 9, 3.75x < 4, 8 us
    share = goals.gpu_head(224, "nchw", 8)[2].judge(taken, "ours")
    assert share["value"] == pytest.approx(50 / 8 / (200 / 24)) and share["reached"]
    assert goals.gpu_head(224, "nchw", 2) == []
    at_most = goals.costs_at_most("plain", 0.80).judge(taken, "ours")
    assert at_most["value"] == pytest.approx(0.8) and at_most["text"] == "<= 0.8x the time of plain"
    assert goals.costs_at_most("plain", 0.79).judge(taken, "ours")["reached"] is False
    assert goals.keeps_less("eager", 14).judge(taken, "ours")["value"] == 15
    assert goals.keeps_less("compiled", 1).judge(taken, "ours")["reached"] is False  # nothing was measured
    assert goals.no_more_kernels("plain").judge(taken, "ours")["reached"] is True
    assert goals.no_more_kernels("plain").judge(replace(taken, kernels={}), "ours")["reached"] is False
    bare = "fused, no branches"
    assert [g.text for g in goals.gpu_network("vgg16", "training step", 224, 32, False, bare)] == [
        "<= 0.85x the time of plain",
        f"<= 1.005x the time of {bare}",
    ]
    texts = [g.text for g in goals.gpu_network("vgg16", "inference", 224, 32, True, bare)]
    assert texts == ["<= 0.96x the time of plain", f"<= 1.005x the time of {bare} + 6 us"]
    assert goals.costs_at_most("plain", 0.80, besides=1e-6).judge(taken, "ours")["value"] == pytest.approx(0.7)
    assert len(goals.gpu_network("vgg16", "training step", 32, 128, False)) == 2
    for none in (("vgg16", "training step", 224, 8), ("vgg16", "inference", 32, 2048), ("vgg16_bn", "inference", 224, 32)):
        assert goals.gpu_network(*none, False) == []


# --- each case, built and checked -----------------------------------------------------------------------------------------
TINY = ((8, 8, 6), (16, 4, 4), (8, 3, 2), (8, 2, 2))


@pytest.fixture
def tiny(monkeypatch):
    """Maps, networks and batches of a size for a CPU; the compiler stays out of it."""
    head, tap, train = (room(module) for module in MODULES[:3])
    monkeypatch.setattr(peers, "compiled", lambda f, mode=None: f)
    monkeypatch.setattr(head, "HEAD_STAGES", TINY)
    monkeypatch.setattr(head, "CHANNELS", [c for c, _, _ in TINY])
    monkeypatch.setattr(head, "at_pixels", lambda maps, pixels: maps)
    monkeypatch.setattr(tap, "STAGES", {"five boundaries": ((4, 9, 7), *TINY)})
    monkeypatch.setattr(run.copying, "COPY_BYTES", 1 << 20)
    original = networks.interflow_vision.create_model
    monkeypatch.setattr(networks.interflow_vision, "create_model", lambda name, **options: original(name, **{**options, "width": 0.1}))
    for module in (head, tap, train):
        monkeypatch.setattr(module, "cold_sets", lambda *_: 2, raising=False)
    return head, tap, train


def built(plan):
    """The plan's case on a CPU, its batch cut down, checked, each provider called."""
    bound = inspect.signature(plan.build.func).bind(*plan.build.args).arguments
    small = (("batch", 3), ("classes", 7))
    if "cell" in bound:
        bound["cell"] = replace(bound["cell"], **{key: min(getattr(bound["cell"], key), most) for key, most in small})
    made = plan.build.func(**bound | {key: min(bound[key], most) for key, most in small if key in bound})
    run.check(made)
    assert set(plan.providers) - set(made.providers) <= {"launch", "copy", "TensorRT", "fused, no branches"}
    return made


def test_every_head_case_is_right(tiny):
    for plan in tiny[0].gpu_plans(CPU):
        made = built(plan)
        assert made.family == ("wall" if "calls" in plan.name or "host time" in plan.name else "device")


def test_every_tap_case_is_right_and_backward_alone_is_backward(tiny):
    for plan in tiny[1].gpu_plans(CPU):
        made = built(plan)
        if made.about["pass"] == "backward":
            with run.torch.profiler.profile() as profile:
                made.providers["eager"].call(0)
            called = {event.name for event in profile.events()}
            assert "aten::max_pool2d_with_indices_backward" in called and "aten::max_pool2d_with_indices" not in called
            assert made.bytes == roofline.TapShape(((4, 9, 7), *TINY), (True,) * 4 + (False,), made.images, 2).backward_bytes()


def test_every_network_case_is_right(tiny):
    for plan in tiny[2].gpu_plans(CPU):
        if "224px" in plan.name and "compiled" in plan.name:
            continue  # the same networks without a compiler here
        made = built(plan)
        assert tuple(made.providers) == plan.providers
        assert made.family == ("device" if "graph" in plan.name else "wall")
        assert made.memory and made.images == min(3, int(plan.name.split("B=")[1].split()[0]))
        dtypes = {p.dtype for p in made.providers["plain"].call.__self__.net.parameters()}
        assert dtypes == {torch.float32 if "autocast" in plan.name else torch.bfloat16}


def test_limits_of_a_device(monkeypatch):
    monkeypatch.setattr(run.copying, "COPY_BYTES", 1 << 12)
    limits = run.device_limits(CPU)
    assert limits["copy"].bytes == 2 << 12 and limits["launch"].bytes == 0
    made = made_case(bytes=96)
    made.providers |= limits
    info = run.summary(made, {name: [1e-3] * 9 for name in made.providers}, "ours", CPU, {"ours": 5}, {"ours": 2})
    assert set(info["share"]) == {"read", "copy"}  # a launch moves nothing
    assert (info["saved_bytes"], info["kernels"]) == (5, 2)


@pytest.mark.parametrize("faster", ["copy", "copy by a kernel"])
def test_the_copy_that_shares_are_of_is_the_faster_one(monkeypatch, faster):
    """Of the driver's and a kernel's, measured once on each GPU."""
    copying, timed = run.copying, []
    x, y = (torch.ones(8, device="meta") for _ in range(2))
    gpu = SimpleNamespace(device=torch.device("cuda", 0))
    ways = copying.copies(x, y)
    monkeypatch.setattr(copying, "_faster", {})
    monkeypatch.setattr(copying, "copies", lambda x, y: ways)
    monkeypatch.setattr(copying, "graph_turn", lambda way, sets, device: timed.append(way) or (lambda: 1.0 if way is ways[faster] else 2.0))
    assert copying.faster_copy(gpu, y) is ways[faster] and copying.faster_copy(gpu, y) is ways[faster]
    assert timed == list(ways.values())
    assert copying.faster_copy(x, y) is ways["copy"]  # not a GPU


def test_both_copies_copy():
    x, y = torch.randn(5), torch.empty(5)
    for name, sign in (("copy", 1), ("copy by a kernel", -1)):
        run.copying.copies(x, y)[name](0)
        assert torch.equal(y, sign * x)


def test_a_spent_budget_skips_with_its_reason():
    session = run.Session(CPU, deadline=0.0)
    plan = case.Plan("late", ("ours",), lambda: pytest.fail("built"))
    with pytest.raises(pytest.skip.Exception, match="budget was spent"):
        session.record(None, plan, "ours")
    session = run.Session(CPU, deadline=time.perf_counter() + 50)
    with pytest.raises(pytest.skip.Exception, match="budget was spent"):  # what cannot end in time is not begun
        session.record(None, replace(plan, setup=60.0), "ours")


def test_a_case_that_does_not_fit_into_memory_is_skipped_with_its_reason():
    def build():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.06 GiB.\nAnd much more.")

    session, plan = run.Session(CPU), case.Plan("large", ("ours", "eager"), build)
    for provider in plan.providers:
        with pytest.raises(pytest.skip.Exception, match=r"does not fit into this GPU's memory: CUDA out of memory\. Tried to allocate 3\.06 GiB\.$"):
            session.record(None, plan, provider)


def test_a_gate_by_norm_lets_one_large_error_pass_and_refuses_many():
    expected = [torch.ones(10_000)]
    one, all_, lost = expected[0].clone(), 1.2 * expected[0], torch.zeros(10_000)
    one[7] = 1.2
    gate.refuse_wrong("ours", [one], expected, 0.1, by_norm=True)
    with pytest.raises(AssertionError, match="wrong by 2.0e-01 of the largest value"):
        gate.refuse_wrong("ours", [one], expected, 0.1)
    for wrong, message in ((all_, "wrong by 2.0e-01 of the norm"), (lost, "wrong by 1.0e"), (one / 0, "wrong by nan|inf")):
        with pytest.raises(AssertionError, match=message):
            gate.refuse_wrong("ours", [wrong], expected, 0.1, by_norm=True)
    made = made_case(by_norm=True, tolerance=0.1)
    made.providers["ours"].call = lambda _: made.expected()[0] + torch.tensor([3.0, 0, 0, 0])  # 0.14 of the largest value, 0.09 of the norm
    run.check(made)
