"""The CUDA stage tap's units, as the host plans them: they cover a map once, and the batch only says how many there are."""

import random

import pytest

_C = pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")


def shape(rng):
    """C, H, W, element size, max_pool, channels_last."""
    sizes = [rng.choice([1, 2, 3, 7, 14, 28, 56, 112, rng.randint(1, 300)]) for _ in range(2)]
    return rng.choice([1, 3, 8, 64, 100, 512, 520]), *sizes, rng.choice([2, 4]), rng.random() < 0.5, rng.random() < 0.5


def test_units_cover_thousands_of_maps_once():
    rng = random.Random(0)
    for _ in range(3000):
        channels, height, width, _, max_pool, channels_last = s = shape(rng)
        batch = rng.randint(1, 300)
        plan = _C.tap_plan(batch, *s)
        windows, pieces = -(-height // 2) * -(-width // 2), -(-height * width // plan.vector)
        positions = plan.positions
        assert positions == (windows if max_pool else height * width if channels_last else pieces)
        assert (plan.parts - 1) * plan.part_size < positions <= plan.parts * plan.part_size
        assert (plan.slabs - 1) * plan.slab < channels <= plan.slabs * plan.slab
        assert plan.units == -(-batch // plan.images) * plan.slabs * plan.parts
        assert plan.images == 1 or (channels_last and plan.parts == 1)
        threads = plan.lanes * plan.images * (plan.slab // plan.vector if channels_last else 1)
        assert 1 <= threads <= plan.threads
        assert not (plan.staged and channels_last)


def test_the_batch_decides_nothing_but_the_number_of_units():
    rng = random.Random(1)
    for _ in range(500):
        s = shape(rng)
        plans = [_C.tap_plan(batch, *s) for batch in (1, 7, 1000)]
        assert len({(p.slab, p.images, p.lanes, p.positions, p.part_size, p.parts, p.slabs, p.staged) for p in plans}) == 1


def test_what_no_kernel_takes_is_refused():
    for s in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1 << 31, 1), (1, 1, 1 << 16, 1 << 16), (1 << 40, 8, 2, 2)):
        with pytest.raises(ValueError, match="beyond the kernel's numbers, or empty"):
            _C.tap_plan(*s, 2, True, True)
