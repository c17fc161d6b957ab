"""The CUDA head's schedule, proven on the CPU: every pixel once, waits only for smaller tickets, order by shape alone."""

import random
from collections import Counter

import pytest

_C = pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")

LARGE = 1 << 30
LAYOUTS = ("contiguous", "channels_last", "cropped", "permuted")


def strides(channels, height, width, layout):
    """(b, c, h, w) in elements."""
    if layout == "contiguous":
        return channels * height * width, height * width, width, 1
    if layout == "channels_last":
        return channels * height * width, 1, width * channels, channels
    if layout == "cropped":
        return (channels + 2) * (height + 3) * (width + 1), (height + 3) * (width + 1), width + 1, 1
    return channels, 1000 * channels * height, 1000 * channels, 2 * channels * height


def draw(rng, address=0):
    channels, height, width = rng.choice([1, 2, 3, 5, 8, 16, 24, 33, 64, 128, 520]), rng.randint(1, 40), rng.randint(1, 40)
    bins = rng.choice([(1, 1)] * 4 + [(2, 3), (height, 1)])
    element, layout = rng.choice([2, 4]), rng.choice(LAYOUTS)
    return [channels, height, width, element, *strides(channels, height, width, layout), *bins, address]


def schedule(maps, batch, classes=10, weight_bytes=0, wide=32):
    return _C.head_schedule(maps, batch, classes, weight_bytes, wide)


def window(bin_, bins, size):
    return bin_ * size // bins, -(-(bin_ + 1) * size // bins)


def visits(plan, maps, group, unit):
    """(stage, image, channel, row, column, bin) of every element that a unit sums, as the kernel goes through them."""
    stage, block, bin_, part, slab, _, _ = plan.unit(group, unit)
    s = plan.stages[stage]
    channels, height, width, bins_h, bins_w = maps[stage][0], maps[stage][1], maps[stage][2], maps[stage][8], maps[stage][9]
    (top, bottom), (left, right) = window(bin_ // bins_w, bins_h, height), window(bin_ % bins_w, bins_w, width)
    columns, pixels = right - left, (bottom - top) * (right - left)
    steps = pixels if s.pixels else pixels // s.vector
    images = plan.images(group)
    for item in range(s.items):
        index = block * s.items + item
        for lane in range(s.lanes):
            if s.pixels:
                image, channel = index, slab * s.width + lane * s.vector
                if image >= images or channel >= channels:
                    continue
            else:
                image, channel = divmod(index, channels)
                if image >= images:
                    continue
            for stepper in range(s.steppers):
                for done in range(s.steps_each):
                    step = part * s.steps_each * s.steppers + stepper + done * s.steppers
                    if step >= steps:
                        continue
                    for v in range(s.vector):
                        pixel, c = (step, channel + v) if s.pixels else (step * s.vector + v, channel)
                        yield stage, group * plan.group_images + image, c, top + pixel // columns, left + pixel % columns, bin_


@pytest.mark.parametrize("seed", range(6))
def test_every_element_is_summed_exactly_once(seed):
    rng = random.Random(seed)
    done = 0
    while done < 400_000:
        maps, batch = [draw(rng) for _ in range(rng.randint(1, 3))], rng.randint(1, 40)
        elements = sum(batch * m[0] * m[1] * m[2] for m in maps)
        if elements > 40_000:
            continue
        done += elements
        plan = schedule(maps, batch)
        seen = Counter(v for g in range(plan.groups) for u in range(units(plan, g)) for v in visits(plan, maps, g, u))
        assert max(seen.values()) == 1
        expected = 0
        for m in maps:
            rows = sum(b - a for a, b in (window(i, m[8], m[1]) for i in range(m[8])))
            columns = sum(b - a for a, b in (window(i, m[9], m[2]) for i in range(m[9])))
            expected += batch * m[0] * rows * columns
        assert len(seen) == expected


def units(plan, group):
    return sum(pool and g == group for pool, g, _ in map(plan.ticket, range(plan.tickets)))


def test_thousands_of_shapes():
    """Tickets name every unit and tile once, wait only for smaller ones, and counters are each somebody's own."""
    rng = random.Random(0)
    for _ in range(2500):
        maps, classes = [draw(rng) for _ in range(rng.randint(1, 4))], rng.choice([1, 7, 8, 9, 33, 1000])
        batch = rng.choice([1, 2, 15, 16, 17, 33, 64, 65, 130])
        plan = schedule(maps, batch, classes, rng.choice([0, 1 << 30]), rng.choice([8, 16, 32]))
        if plan.tickets > 30_000:
            continue
        assert sum(plan.images(g) for g in range(plan.groups)) == batch
        pools, tiles, events = Counter(), Counter(), Counter()
        arrivals, counters = Counter(), {0, 1}
        for t in range(plan.tickets):
            pool, group, index = plan.ticket(t)
            if pool:
                assert not tiles[group], "a tile of this group has a smaller ticket: it would wait for a larger one"
                assert index == pools[group]
                pools[group] += 1
                stage, _, _, part, _, reduction, counter = plan.unit(group, index)
                parts = plan.stages[stage].parts
                assert part < parts
                if parts == 1:
                    events[group] += 1
                else:
                    arrivals[group, stage, reduction, counter] += 1
            else:
                assert index == tiles[group]
                tiles[group] += 1
                assert (index + 1) * plan.tile_classes(group) < classes + plan.tile_classes(group)
        for (group, stage, _, counter), count in arrivals.items():
            assert count == plan.stages[stage].parts
            assert counter < plan.reductions
            events[group] += 1
            place = plan.reduction_counter(group, counter)
            assert place not in counters
            counters.add(place)
        for group in range(plan.groups):
            assert events[group] == plan.events(group)
            assert tiles[group] == plan.tile_count(group)
            assert tiles[group] * plan.tile_classes(group) >= classes
            counters |= {plan.done_counter(group), plan.done_counter(group) + 1}
        assert max(counters) < plan.counters


def test_an_image_is_summed_alike_in_any_batch_and_at_any_address():
    """Threads, parts and vectors are those of the shape: they know neither the batch, nor the classes, nor where the map lies."""
    rng = random.Random(1)
    for _ in range(2000):
        m = draw(rng)
        keys = set()
        for batch, classes, address in ((1, 10, 0), (64, 1000, 2), (1000, 3, 8)):
            s = schedule([[*m[:-1], address]], batch, classes, rng.choice([0, 1 << 30])).stages[0]
            keys.add((s.pixels, s.flat, s.vector, s.lanes, s.steppers, s.steps_each, s.parts, s.slabs, s.bins))
        assert len(keys) == 1


def test_only_vectors_depend_on_addresses():
    m = [64, 14, 14, 2, *strides(64, 14, 14, "channels_last"), 1, 1]
    assert schedule([[*m, 0]], 4).stages[0].vectors
    assert not schedule([[*m, 2]], 4).stages[0].vectors


def test_vgg_at_224_pixels():
    """Loads of 16 bytes, 64 KB or less a unit; the last group's classes are shared out over all processors."""
    maps = [[c, s, s, 2, *strides(c, s, s, "channels_last"), 1, 1, 0] for c, s in ((128, 112), (256, 56), (512, 28), (512, 14))]
    plan = schedule(maps, 1, 1000)
    assert [s.vector for s in plan.stages] == [8] * 4
    largest = max(s.steppers * s.lanes * s.items * s.steps_each * 16 for s in plan.stages)
    assert largest == 64 << 10
    assert plan.tile_count(0) == 125
    assert plan.tickets - 125 == 49 + 2 * 13 + 4 * 4 + 4
    assert schedule(maps, 256, 1000, wide=16).tile_classes(0) == 16


@pytest.mark.parametrize(
    ("batch", "weight_bytes", "images"), [(1, 1 << 30, 16), (16, 1 << 30, 16), (17, 1 << 30, 64), (99, 6 << 20, 16), (99, (6 << 20) + 1, 64)]
)
def test_large_weights_are_read_for_64_images_at_once(batch, weight_bytes, images):
    assert _C.group_images(batch, weight_bytes) == images


def test_numbers_beyond_the_kernel_are_refused():
    for m in ([1, 1 << 16, 1 << 16], [1 << 29, 2, 2], [1, 1 << 13, 1 << 13, 1 << 13]):
        bins = [m.pop()] * 2 if len(m) > 3 else [1, 1]
        with pytest.raises(ValueError, match="beyond"):
            schedule([[*m, 2, *strides(*m, "contiguous"), *bins, 0]], 64)
    with pytest.raises(ValueError, match="11 numbers"):
        _C.head_schedule([[1, 2]], 1, 1, 0, 8)
