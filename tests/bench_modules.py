"""bench/ for tests: its modules, which are scripts and not installed, and samples as a busy machine gives them."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


def room(name):
    """A module of bench/, which is a folder of scripts and not installed."""
    sys.path.insert(0, str(BENCH))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCH))


def drifting(generator, rounds):
    """Relative slowness of a shared machine, round by round: slow waves and sudden stalls, which all providers of a round meet."""
    wave = np.cumsum(generator.normal(0, 0.05, rounds))
    return np.exp(wave) * np.where(generator.random(rounds) < 0.1, 3.0, 1.0)


pytest.importorskip("matplotlib")

stats, roofline, gate, goals = room("harness.stats"), room("harness.roofline"), room("harness.gate"), room("harness.goals")
case, run, clock, memory, inputs = room("harness.case"), room("harness.run"), room("harness.clock"), room("harness.memory"), room("harness.inputs")
results, tables, page, charts = room("pages.results"), room("pages.tables"), room("pages.page"), room("pages.charts")
compare, report, readme = room("pages.compare"), room("pages.report"), room("pages.readme")

CPU = torch.device("cpu")


def made_case(wrong=0.0, **options):
    x = torch.arange(12.0).reshape(3, 4)
    providers = {
        "ours": case.Provider(lambda i: x.sum(0) + wrong, "ours"),
        "eager": case.Provider(lambda i: x.sum(0), "peer"),
        "read": case.Provider(lambda i: None, "limit", bytes=48),
    }
    given = dict(about={"pass": "forward"}, bytes=96, images=3, expected=lambda: [x.double().sum(0)], goals={"ours": [goals.faster_than_peers(2.0)]})
    return case.Case("sum", "a case", "device", providers, **(given | options))


def synthetic(seed, slower=None, cases=40, rounds=40):
    """A run's results: cases of ours, eager and copy with random times on a drifting machine; `slower`: that case's ours takes 1.3 times as long."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(cases):
        machine = drifting(generator, rounds) * (1 + seed % 3)  # one run's machine is busier all along
        times = {name: machine * generator.lognormal(0, 0.05, rounds) * t * 1e-3 for name, t in (("ours", 1.0), ("eager", 2.0), ("read", 0.9))}
        if i == slower:
            times["ours"] = times["ours"] * 1.3
        made = made_case(bytes=48, about={"pass": "forward", "dtype": "fp32", "layout": "nchw", "batch": i + 1, "pixels": 224, "inputs": "cold"})
        made.name, made.operator = f"case {i}", "interflow_head"
        rows += [run.summary(made, {k: list(v) for k, v in times.items()}, name, CPU) for name in times]
    machine = {"cpu": "a processor", "cores": 2, "threads": 2, "last_level_cache_mib": 32, "versions": {"torch": "2.13.0"}}
    return results.Results(machine, "0123456789", "2026-01-01", {"set": "quick", "timed_s": 1, "whole_s": 2, "others_cores": 0.0}, rows, "digest")
