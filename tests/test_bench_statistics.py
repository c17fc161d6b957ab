"""Of the benchmarks: bytes that an operator must move, and what is concluded from samples."""

import numpy as np
import pytest
import torch
from bench_modules import drifting, room

pytest.importorskip("matplotlib")


stats, roofline = room("harness.stats"), room("harness.roofline")

CPU = torch.device("cpu")


def test_bytes_of_the_head():
    shape = roofline.HeadShape(((2, 3, 5), (4, 1, 2)), classes=10, batch=7, element=4)
    assert shape.width == 6
    assert shape.map_bytes() == 7 * (2 * 15 + 4 * 2) * 4
    assert shape.forward_bytes() == shape.map_bytes() + 10 * 6 * 4 + 7 * 10 * 4
    assert shape.forward_flops() == 7 * 38 + 2 * 7 * 10 * 6


def test_bytes_of_the_tap():
    shape = roofline.TapShape(((3, 5, 4), (2, 3, 3)), (True, False), batch=2, element=2)
    assert shape.map_bytes() == 2 * (60 + 18) * 2
    assert shape.pooled_bytes() == 2 * 3 * 2 * 2 * 2
    assert shape.mask_bytes() == 2 * (3 * 3 * 2 + 2 * 2)  # a byte a window, odd ends too; a bit an element, 9 of them in 2 bytes
    assert shape.forward_bytes(training=False) == shape.map_bytes() + shape.pooled_bytes() + 2 * 5 * 4
    assert shape.forward_bytes(training=True) - shape.forward_bytes(training=False) == shape.mask_bytes()


def test_bytes_of_the_stage_end():
    maps = ((3, 5, 4), (2, 3, 3))
    each, means = 2 * (60 + 18) * 2, 2 * 5 * 4
    for residual, relu, forward, backward in ((True, True, 3, 3), (False, True, 2, 3), (False, False, 2, 2)):
        shape = roofline.EndShape(maps, batch=2, element=2, residual=residual, relu=relu)
        assert (shape.forward_bytes(), shape.backward_bytes()) == (forward * each + means, backward * each + means)


def test_stages_at_other_pixels():
    assert [h for _, h, _ in roofline.at_pixels(roofline.BOUNDARIES, 32)] == [32, 16, 8, 4, 2]


def test_quantiles():
    assert [stats.quantile([4, 1, 3, 2], q) for q in (0, 0.5, 1)] == [1, 2.5, 4]
    assert stats.quantile([0, 10], 0.2) == pytest.approx(2)


def test_order_interval_is_that_of_the_binomial():
    assert stats.order_interval(range(1, 7)) == (1, 6)  # 1 - 2 / 64 = 0.969; the next pair would have 0.781
    assert stats.order_interval(range(1, 10)) == (2, 8)  # 0.961
    assert stats.order_interval([5.0]) == (5.0, 5.0)


def test_ratio_interval_holds_the_median_and_wants_pairs():
    generator = np.random.default_rng(0)
    b = generator.lognormal(0, 0.1, 30)
    median, low, high = stats.ratio_interval(2 * b * generator.lognormal(0, 0.02, 30), b)
    assert low <= median <= high
    assert 1.95 < low < 2.05 and high - low < 0.1
    with pytest.raises(ValueError, match="got 2 and 1"):
        stats.ratio_interval([1, 2], [1])


@pytest.mark.parametrize("rounds", [9, 25, 100])
def test_intervals_of_one_provider_against_itself_hold_1(rounds):
    generator = np.random.default_rng(rounds)
    held = 0
    for trial in range(200):
        machine = drifting(generator, rounds)
        a, b = (machine * generator.lognormal(0, 0.05, rounds) for _ in range(2))
        _, low, high = stats.ratio_interval(a, b, seed=trial)
        held += low <= 1 <= high
    assert held >= 0.95 * 200


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert stats.holm([0.9, 0.9]) == [1.0, 1.0]


def test_rank_test_knows_equal_from_shifted():
    generator = np.random.default_rng(1)
    a, b = generator.normal(0, 1, 200), generator.normal(0, 1, 200)
    assert stats.rank_p_value(a, b) > 0.05
    assert stats.rank_p_value(a, b + 1) < 1e-9
    assert stats.rank_p_value([1.0] * 5, [1.0] * 5) == 1.0


def test_exponent_and_crossover():
    assert stats.exponent([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)
    assert stats.crossover([1, 4, 16], [3.0, 1.5, 0.5]) == pytest.approx(8)
    assert stats.crossover([1, 4], [3.0, 1.5]) is None
