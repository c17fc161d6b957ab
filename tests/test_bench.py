"""The benchmarks' own arithmetic and honesty: bytes, quantiles, intervals, the gate, goals, A/A runs, comparison, README section."""

import copy
import functools
import importlib
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from bench_modules import (
    BENCH,
    CPU,
    case,
    charts,
    clock,
    compare,
    goals,
    inputs,
    made_case,
    memory,
    page,
    readme,
    report,
    results,
    room,
    run,
    synthetic,
    tables,
)

pytest.importorskip("matplotlib")


# --- the harness ------------------------------------------------------------------------------------------------------
def test_gate_lets_right_providers_pass_and_refuses_wrong_ones():
    run.check(made_case())
    with pytest.raises(AssertionError, match=r"a case: ours, result 0 is wrong by .* not timed"):
        run.check(made_case(wrong=0.1))
    with pytest.raises(AssertionError, match="gives 1 results, 2 expected"):
        run.check(made_case(expected=lambda: [torch.zeros(4), torch.zeros(4)]))
    with pytest.raises(AssertionError, match=r"is \(4,\), expected \(3,\)"):
        run.check(made_case(expected=lambda: [torch.zeros(3)]))


def test_a_twin_is_called_inside_its_own_surroundings_and_judged_by_its_own_goals():
    inside = []

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    made = made_case(memory=True)

    def call(_):
        assert inside
        return made.providers["ours"].call(0)

    made.providers["Triton"] = case.Provider(call, "twin", saved=lambda: 8 * len(inside), around=around)
    made.goals["Triton"] = [goals.faster_than("ours", 0.01)]
    run.check(made)
    samples = run.Session(CPU).measure(made, 0.01)
    saved, kernels = run.counted(made, CPU)
    rows = {name: run.summary(made, samples, name, CPU, saved, kernels) for name in samples}
    assert rows["Triton"]["goals"][0]["reached"] and rows["Triton"]["saved_bytes"] == 8 and not inside
    assert rows["ours"]["best_peer"] == "eager" and len(rows["ours"]["goals"]) == 1  # a twin is no peer
    found = results.Results({}, "", "", {}, list(rows.values()), "")
    assert [row["provider"] for row, _ in found.goals()] == ["ours", "Triton"] and found.comparable() == [rows["ours"]]
    made.providers["Triton"].call = lambda _: torch.zeros(4)
    with pytest.raises(AssertionError, match="a case: Triton, result 0 is wrong"):
        run.check(made)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
def test_the_triton_twin_serves_forward_and_backward():
    """Under Triton's interpreter, in a process of its own, with the backend forced to another as on a GPU."""
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from harness.case import Provider
from harness.twin import triton
from interflow_kernels import stage_tap
from interflow_kernels.triton.common.launch import noted

def step(_):
    u = torch.ones(1, 2, 4, 4, requires_grad=True)
    m, p = stage_tap(u)
    return torch.autograd.grad([m, p], u, [m.detach(), p.detach()])

for provider in (Provider(step, "ours"), triton(Provider(step, "ours"))):
    with noted() as launches, provider.around():
        provider.call(0)
    print(provider.kind, *(launch.kernel.__name__ for launch in launches))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "INTERFLOW_BACKEND": "native"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(BENCH)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == ["ours", "twin tap_planes tap_planes_backward"]


def test_gate_refuses_nan():
    with pytest.raises(AssertionError, match="not timed"):
        run.check(made_case(wrong=float("nan")))


def test_a_wrong_case_is_never_timed():
    session = run.Session(CPU)
    plan = case.Plan("a case", ("ours",), lambda: made_case(wrong=1.0))
    for _ in range(2):  # the second provider's test finds nothing either
        with pytest.raises(AssertionError):
            session.record(None, plan, "ours")
    assert session.timed == 0


def test_summary_from_known_samples():
    samples = {"ours": [1e-3] * 10, "eager": [3e-3] * 10, "read": [0.4e-3] * 10}
    info = run.summary(made_case(), samples, "ours", CPU)
    assert info["p50_us"] == 1000
    assert info["gb_per_s"] == pytest.approx(96 / 1e-3 / 1e9, rel=1e-3)
    assert info["images_per_s"] == 3000
    assert info["speed_up"] == {"eager": [3.0, 3.0, 3.0]}
    assert info["share"]["read"] == pytest.approx([0.8] * 3)  # twice the bytes in 2.5 times the time
    assert info["best_peer"] == "eager"
    assert info["goals"] == [{"text": ">= 2x the best peer", "value": 3.0, "low": 3.0, "high": 3.0, "unit": "x", "reached": True}]
    assert results.samples(info) == [1000] * 10


def test_goals():
    measured = goals.Measured({"ours": [2.0] * 9, "eager": [5.0] * 9, "none": [1.0] * 9}, {"ours": "ours", "eager": "peer", "none": "base"}, 0, {})
    assert goals.adds_less("eager", "none", 4).judge(measured, "ours")["value"] == 4
    assert goals.call_time(9).judge(measured, "ours")["reached"] is False
    assert goals.faster_than("none", 0.5, low=0.6).judge(measured, "ours")["reached"] is False  # the ratio is enough, its interval is not


def test_measure_interleaves_and_rotates_inputs():
    seen = []
    providers = {name: case.Provider(lambda i, name=name: seen.append((name, i)), "peer") for name in ("a", "b")}
    long = case.Case("x", "x", "device", providers, {}, sets=5)
    samples = run.Session(CPU).measure(long, 0.0)
    assert {name: len(taken) for name, taken in samples.items()} == {"a": run.ROUNDS[0], "b": run.ROUNDS[0]}
    assert {name for name, _ in seen} == {"a", "b"}


@pytest.mark.parametrize("sets", [1, 2, 4, 12])
def test_rotation_keeps_sets_cold_and_gives_every_provider_all_of_them(sets):
    drawn = list(itertools.islice(clock.rotation(sets), 400))
    for i, chosen in enumerate(drawn):
        assert chosen not in drawn[max(0, i - (sets - max(1, sets // 3))) : i]
    if sets >= 6:
        assert all(set(drawn[first::4]) == set(range(sets)) for first in range(4))


def test_each_turn_starts_with_an_untimed_call(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(clock.time, "perf_counter", lambda: float(next(ticks)))
    seen = []
    turn = clock.call_turn(seen.append, itertools.count(), CPU)
    del seen[:]
    assert turn() == 1.0  # one tick of this clock for one timed call
    assert len(seen) == 2


def test_replay_timer_gives_back_the_samples():
    timer = clock.ReplayTimer()
    timer.load([0.5, 0.25])
    assert [end - start for start, end in ((timer(), timer()), (timer(), timer()))] == [0.5, 0.25]


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(10, requires_grad=True)
    assert memory.saved_bytes(lambda: x.exp(), [x]) == 40
    assert memory.saved_bytes(lambda: x * x, [x]) == 0


def test_cold_inputs_exceed_the_cache():
    each = 1 << 20
    assert inputs.cold_sets(each, CPU) * each > room("harness.machine").cold_bytes(CPU) or inputs.cold_sets(each, CPU) == 512
    a, b = (inputs.feature_maps(((2, 3, 3),), 1, "fp32", "channels_last", 2, CPU) for _ in range(2))
    assert torch.equal(a[1][0], b[1][0]) and not torch.equal(a[0][0], a[1][0])


@pytest.mark.parametrize("module", ["bench_backbones", "bench_head", "bench_stage_tap", "bench_stage_end", "bench_train_step", "bench_complexity"])
def test_plans_have_names_of_their_own_and_the_full_set_holds_the_quick_one(module):
    quick, full = ([plan.name for plan in room(module).plans(full, CPU)] for full in (False, True))
    assert len(set(full)) == len(full)
    assert set(quick) <= set(full)


# --- two runs ---------------------------------------------------------------------------------------------------------
@functools.cache
def test_a_run_against_itself_changes_nothing():
    assert [c for c in compare.changes(synthetic(1), synthetic(11)) if c.verdict != "-"] == []
    alarms = sum(any(c.verdict != "-" for c in compare.changes(synthetic(seed, cases=8), synthetic(seed + 100, cases=8))) for seed in range(20))
    assert alarms <= 1  # the correction allows one comparison in twenty a false alarm


def test_intervals_of_two_equal_runs_hold_1():
    made = [c for seed in (0, 1) for c in compare.changes(synthetic(seed), synthetic(seed + 10))]
    assert np.mean([c.ratio[1] <= 1 <= c.ratio[2] for c in made]) >= 0.93  # 160 unpaired bootstrap intervals of 95 %


def test_compare_finds_the_one_that_changed():
    flagged = [c for c in compare.changes(synthetic(0), synthetic(10, slower=7)) if c.verdict != "-"]
    assert [(c.case, c.provider, c.verdict) for c in flagged] == [("case 7", "ours", "slower")]
    assert "1 of 80 changed" in compare.report(synthetic(0), synthetic(10, slower=7))


def test_compare_gives_no_verdict_on_a_busy_machine():
    busy = copy.deepcopy(synthetic(10, slower=7))
    busy.run["others_cores"] = 0.8
    assert [c for c in compare.changes(synthetic(0), busy) if c.verdict != "-"] == []
    assert "no verdicts" in compare.report(synthetic(0), busy)


# --- the report -------------------------------------------------------------------------------------------------------
def test_a_losing_case_is_shown_as_one():
    run_ = copy.deepcopy(synthetic(0))
    row = run_.ours()[0]
    row["speed_up"]["eager"] = [0.5, 0.45, 0.55]
    made = tables.tables(run_)
    shown = next(table for table in made if table.title.startswith("Against")).rows
    assert shown[0][0][0] == "case 0" and shown[0][3][0] == "slower"
    html = page.page(run_, made, charts.charts(run_), report.facts(run_))
    assert "class=lost" in html
    assert ("1", "cases slower") in report.facts(run_)


def test_networks_are_shown_with_and_without_a_peer():
    kinds = {"Interflow fused": "ours", "plain": "base", "Interflow naive": "peer"}
    run_ = copy.deepcopy(synthetic(0, cases=1))
    for name, names in (("compiled", list(kinds)[:2]), ("eager", list(kinds))):
        about = {"pass": "inference", "dtype": "bf16", "layout": "nchw", "batch": 8, "pixels": 224}
        made = case.Case("network", name, "wall", {n: case.Provider(lambda i: None, kinds[n]) for n in names}, about, images=8, memory=True)
        samples = {n: [t] * 9 for n, t in zip(names, (1e-3, 2e-3, 3e-3), strict=False)}
        run_.rows.extend(run.summary(made, samples, n, CPU, {}, {"Interflow fused": 40, "plain": 44}) for n in names)
    shown = {table.title: [[text for text, _ in row] for row in table.rows] for table in tables.tables(run_)}
    networks = shown["Whole networks"]
    assert [row[:2] + row[2:4] + row[5:] for row in networks[:2]] == [
        ["compiled", "Interflow fused", "1", "8000", "40", "2.00x [2.00, 2.00]"],
        ["compiled", "plain", "2", "4000", "44", "-"],
    ]
    assert len(networks) == 5 and "peak_bytes" in run_.rows[-1]
    assert [row[-1] for row in shown["With Interflow against without"]] == ["-", "3.00x [3.00, 3.00]"]
    assert "compiled, against plain" in readme.section(run_, "x")
    assert page.page(run_, tables.tables(run_), charts.charts(run_), report.facts(run_)).count("compiled") >= 3


def test_a_busy_machine_is_named():
    run_ = copy.deepcopy(synthetic(0, cases=2))
    assert "not final" not in readme.section(run_, "x")
    run_.run["others_cores"] = 0.8
    assert "Other processes used 0.8 of 2 cores" in report.markdown(run_)
    assert "not final" in readme.section(run_, "x")


def test_page_needs_nothing_else():
    run_ = synthetic(1, cases=3)
    html = page.page(run_, tables.tables(run_), charts.charts(run_), [])
    for outside in ("src=", "@import", "<link", "url(http"):
        assert outside not in html
    assert html.count("<svg") >= 2
    identifiers = [part.split('"')[0] for part in html.split(' id="')[1:]]
    assert len(set(identifiers)) == len(identifiers)


def test_load_reads_what_pytest_benchmark_writes(tmp_path):
    run_ = synthetic(2, cases=1)
    data = {"machine_info": run_.machine, "commit_info": {"id": "f" * 40}, "datetime": "2026-01-01T00:00:00", "run": run_.run}
    (tmp_path / results.FILE).write_text(json.dumps(data | {"benchmarks": [{"extra_info": row} for row in run_.rows]}))
    loaded = results.load(tmp_path)
    assert (loaded.rows, loaded.commit, loaded.date) == (run_.rows, "f" * 10, "2026-01-01")


def test_readme_section_is_replaced_between_its_marks():
    new = readme.section(synthetic(0, cases=2), "bench/results/x")
    assert "case 0" in new
    text = readme.rewritten(f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n", new)
    assert text == f"a\n{new}\nb\n"
    assert readme.rewritten(text, new) == text
    with pytest.raises(ValueError, match="must have"):
        readme.rewritten("no marks", new)
