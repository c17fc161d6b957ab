"""The CUDA stage end's units, as the host plans them: they cover a map once, begin with a chunk, and the batch only says how many there are."""

import random

import pytest

_C = pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")


def shape(rng):
    """C, H, W, element size, channels_last."""
    sizes = [rng.choice([1, 2, 3, 7, 14, 28, 56, 57, 112, rng.randint(1, 300)]) for _ in range(2)]
    return rng.choice([1, 3, 8, 64, 100, 512, 520, 2048]), *sizes, rng.choice([2, 4]), rng.random() < 0.4


def test_units_cover_thousands_of_maps_once():
    rng = random.Random(0)
    for _ in range(3000):
        channels, height, width, element, channels_last = s = shape(rng)
        batch = rng.randint(1, 300)
        plan = _C.end_plan(batch, *s)
        pixels = height * width
        assert (plan.positions, plan.vector) == (pixels, 16 // element)
        assert (plan.parts - 1) * plan.part_size < pixels <= plan.parts * plan.part_size
        assert (plan.slabs - 1) * plan.slab < channels <= plan.slabs * plan.slab
        assert plan.units == -(-batch // plan.images) * plan.slabs * plan.parts
        assert plan.images == 1 or (channels_last and plan.parts == 1)
        if channels_last:
            assert 1 <= plan.lanes * plan.images * (plan.slab // plan.vector) <= plan.threads
            assert plan.whole == (channels % plan.vector == 0)
            continue
        # Units of several planes begin with a chunk of the image; all that a unit's chunks leave has room in half of the least shared memory
        assert plan.parts == 1 or plan.slab == 1
        begins_with_a_chunk = plan.slab * pixels % plan.vector == 0 or plan.slabs == 1
        assert begins_with_a_chunk or plan.vector * pixels > 6 * 1024 * plan.vector  # odd planes that are too large to go together
        assert plan.slots in (1, 2, plan.vector) and plan.numbers * 4 <= 48 * 1024
        assert (plan.slots == 1) == (plan.slab == 1)
        assert not plan.whole or (begins_with_a_chunk and channels * pixels % plan.vector == 0 and pixels >= plan.vector)


def test_ends_of_resnet_50_take_one_unit_without_sums_across_blocks():
    for channels, side in ((256, 56), (512, 28), (1024, 14), (2048, 7)):
        for element in (2, 4):
            planes, pixels = _C.end_plan(32, channels, side, side, element, False), _C.end_plan(32, channels, side, side, element, True)
            assert planes.parts == 1 and planes.whole and pixels.whole
            assert pixels.parts == 1 or side > 7
            assert 12 * 1024 <= planes.slab * side * side * element <= 17 * 1024


def test_the_batch_decides_nothing_but_the_number_of_units():
    rng = random.Random(1)
    for _ in range(500):
        s = shape(rng)
        plans = [_C.end_plan(batch, *s) for batch in (1, 7, 1000)]
        assert len({(p.slab, p.images, p.lanes, p.positions, p.part_size, p.parts, p.slabs, p.slots, p.most, p.numbers, p.whole) for p in plans}) == 1


def test_what_no_kernel_takes_is_refused():
    for s in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 1 << 31, 1), (1, 1, 1 << 16, 1 << 16), (1 << 40, 8, 2, 2)):
        with pytest.raises(ValueError, match="beyond the kernel's numbers, or empty"):
            _C.end_plan(*s, 2, True)
