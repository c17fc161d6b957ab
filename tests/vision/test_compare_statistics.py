"""Intervals against their formulas, and claims against made-up results."""

import math

import pytest

stats = pytest.importorskip("scipy.stats")

from interflow_vision.compare import claims, statistics  # noqa: E402
from interflow_vision.compare.plan import Cell, Claim  # noqa: E402
from interflow_vision.errors import UserError  # noqa: E402

VALUES = [0.81, 0.84, 0.83, 0.86, 0.82]


def test_summary():
    s = statistics.summary(VALUES)
    mean = sum(VALUES) / 5
    sd = math.sqrt(sum((v - mean) ** 2 for v in VALUES) / 4)
    reach = 2.7764451051977987 * sd / math.sqrt(5)  # Student's t, 4 degrees of freedom
    assert (s.n, s.low, s.high) == (5, 0.81, 0.86)
    assert s.mean == pytest.approx(mean) and s.sd == pytest.approx(sd)
    assert s.interval == pytest.approx((mean - reach, mean + reach))
    assert statistics.summary([0.5]).interval is None and statistics.summary([0.5]).sd == 0
    with pytest.raises(ValueError, match="no values"):
        statistics.summary([])


def test_paired_differences_are_by_seed():
    ours, theirs = dict(enumerate(VALUES)), {0: 0.80, 1: 0.82, 3: 0.83, 9: 0.1}
    d = statistics.paired(ours, theirs)
    assert d.n == 3 and d.mean == pytest.approx(0.02)
    sd = 0.01
    reach = 4.302652729911275 * sd / math.sqrt(3)  # 2 degrees of freedom
    assert d.t == pytest.approx((0.02 - reach, 0.02 + reach))
    assert d.bootstrap == pytest.approx((0.01, 0.03))  # of three values, the extremes
    assert statistics.paired(ours, theirs) == d  # the same figures whenever the page is made
    assert statistics.paired(ours, {7: 0.1}) is None
    assert statistics.paired(ours, {0: 0.5}).t is None
    equal = statistics.paired({0: 1.0, 1: 1.0}, {0: 0.5, 1: 0.5})
    assert equal.t == equal.bootstrap == (0.5, 0.5)


def test_an_interval_of_new_runs_is_wider_than_that_of_the_mean():
    low, high = statistics.lands_in([0.8], VALUES)
    mean, sd = statistics.summary(VALUES).mean, statistics.summary(VALUES).sd
    assert high - mean == pytest.approx(2.7764451051977987 * sd * math.sqrt(1 / 5 + 1))
    assert mean - low == pytest.approx(high - mean)
    assert statistics.lands_in([0.8], [0.5]) is None and statistics.lands_in([], VALUES) is None


def test_the_interval_covers_what_it_says():
    """Of many studies of five seeds with a difference of 0, about 5 in 100 see one."""
    import numpy as np

    rng = np.random.default_rng(0)
    outside = 0
    for draw in rng.normal(size=(400, 5)):
        low, high = statistics._t_interval(draw)
        outside += not low <= 0 <= high
    assert 8 <= outside <= 33  # binomial(400, 0.05), its 99.9 % range


# --- claims -----------------------------------------------------------------------------------------------------------------
def result(accuracy, training=1.0, branches=(0.2, 0.4, 0.9), start=(1e-6, 1e-3), epochs=((1e-4, 1e-3), (1e-2, 1e-3)), status="done"):
    test = {"accuracy": accuracy, **{f"accuracy_branch{i}": b for i, b in enumerate(branches, 1)}}
    kept = {"start": list(start), "epochs": [list(norms) for norms in epochs]}
    return {
        "status": status,
        "test": test,
        "training": {"accuracy": training},
        "gradients": kept,
        "cell": {"arm": "x"},
        "contribution": {"branch10": 1.0, "branch2": 2.0},
    }


def test_measures():
    run = result(0.8)
    found = {name: measure.factor * measure.of(run) for name, measure in claims.MEASURES.items()}
    assert found == pytest.approx({"accuracy": 80, "gap": 20, "early_branches": 30, "start_gradient": -3, "gradient": 0})
    assert claims.contributions(run) == [2.0, 1.0]
    with pytest.raises(UserError, match="early_branches is for heads with branches, x has none"):
        claims.MEASURES["early_branches"].of(result(0.8, branches=()))


A, B = Cell("d", "n", "a"), Cell("d", "n", "b")


@pytest.mark.parametrize(
    ("ours", "theirs", "expect", "verdict"),
    [
        ((0.90, 0.91, 0.92), (0.80, 0.81, 0.83), "greater", "holds"),
        ((0.90, 0.91, 0.92), (0.80, 0.81, 0.83), "less", "does not hold"),
        ((0.80, 0.81, 0.83), (0.90, 0.91, 0.92), "greater", "does not hold"),
        ((0.90, 0.81, 0.92), (0.80, 0.91, 0.83), "greater", "not decided"),
        ((0.90,), (0.80,), "greater", "not decided"),
        ((), (0.80,), "greater", "not decided"),
    ],
)
def test_verdicts(ours, theirs, expect, verdict):
    found = {cell: {seed: result(value) for seed, value in enumerate(each)} for cell, each in ((A, ours), (B, theirs))}
    made = claims.verdict(Claim("x", "accuracy", A, B, expect), found)
    assert made.verdict == verdict
    if len(ours) == 3:
        assert made.ours == pytest.approx(100 * sum(ours) / 3) and made.difference.n == 3


def test_a_run_that_diverged_does_not_count_and_a_measure_must_exist():
    found = {A: {0: result(0.9), 1: result(0.0, status="diverged")}, B: {0: result(0.8), 1: result(0.8)}}
    assert claims.verdict(Claim("x", "accuracy", A, B, "greater"), found).difference.n == 1
    with pytest.raises(UserError, match="measure must be one of accuracy, gap, .*, got 'speed' in the claim 'x'"):
        claims.verdict(Claim("x", "speed", A, B, "greater"), found)
