"""interflow_pool's CUDA sources in the host emulation: the bits of the head's own pooled values, whatever the grid and the order; dirty counters are caught."""

import cuda_emulation
import pytest
import torch
from cuda_emulation import Edit

from interflow_kernels.reference import interflow_pool as reference_pool
from interflow_kernels.testing import LAYOUTS, HeadCase, assert_close, assert_same_bits, head_inputs

pytestmark = pytest.mark.skipif(cuda_emulation.why_not() is not None, reason=str(cuda_emulation.why_not()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRIDS = ((1, 0), (2, 1), (7, 2))
PARTS = ((16, 48, 48), (8, 70, 70), (5, 6, 5))  # whose parts meet, in both layouts


@pytest.fixture(scope="module")
def library():
    return cuda_emulation.load(cuda_emulation.operator_sources())


def pooled_by_the_head(library, maps, pool_size):
    width = library.ops.interflow_pool(maps, pool_size).shape[1]
    return library.ops.interflow_head(maps, torch.zeros(3, width), None, None, None, "folded", pool_size, False, None)[2]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_heads(library, dtype, layout):
    for maps, pool_size in ((PARTS, [1, 1]), (((5, 13, 9), (33, 4, 1)), [2, 3])):
        given = head_inputs(HeadCase(batch=3, maps=maps, dtype=dtype, layout=layout))
        with cuda_emulation.emulated(library, 3, 0):
            want = pooled_by_the_head(library, given, pool_size)
        wide = [x.double() for x in given]
        exact = [reference_pool(wide, pool_size), reference_pool([x.abs() for x in wide], pool_size)]
        assert_close("pooled", want, exact[0], magnitude=exact[1])
        for blocks, seed in GRIDS:
            with cuda_emulation.emulated(library, blocks, seed):
                assert_same_bits("pooled", library.ops.interflow_pool(given, pool_size), want)


def test_several_groups_of_images(library):
    given = head_inputs(HeadCase(batch=37, maps=((16, 9, 9), (8, 70, 70)), layout="channels_last"))
    with cuda_emulation.emulated(library, 5, 1):
        whole = library.ops.interflow_pool(given, [1, 1])
        for chosen in ([36], [3, 36, 0], list(range(20))):
            assert_same_bits("some", library.ops.interflow_pool([x[chosen] for x in given], [1, 1]), whole[chosen])


def test_pooled_features_mixed_dtypes_and_empty_ones(library):
    maps = [x.to(kind) for x, kind in zip(head_inputs(HeadCase(batch=2, maps=PARTS)), DTYPES, strict=True)]
    given = [maps[0], maps[1].mean((2, 3)), maps[2]]
    with cuda_emulation.emulated(library, 2, 0):
        assert_same_bits("pooled", library.ops.interflow_pool(given, [1, 1]), pooled_by_the_head(library, given, [1, 1]))
        assert library.ops.interflow_pool([x[:0] for x in given], [1, 1]).shape == (0, 29)
        assert library.ops.interflow_pool([torch.empty(2, 0, 3, 3)], [1, 1]).shape == (2, 0)


def test_fp64_is_refused_by_name(library):
    with pytest.raises(RuntimeError, match=r"interflow_pool: fp64 has no CUDA kernel.*features\[0\] in fp64"):
        library.ops.interflow_pool([torch.randn(1, 2, 3, 3, dtype=torch.float64)], [1, 1])


POOL = "csrc/interflow_head/cuda/pool.cu"
MISTAKES = {
    "counters of groups left dirty": (Edit(POOL, "store_relaxed(P.counters + P.schedule.done_counter(group), 0);", ";"), "counter 2 is .* must be zero again"),
    "the ticket counter left dirty": (Edit(POOL, "    store_relaxed(P.counters + HeadSchedule::kNext, 0);\n", ""), "counter 0 is .* must be zero again"),
    "a last unit that nobody is told of": (Edit(POOL, "  settle(P, before, scratch, flag);\n", ""), "counter .* must be zero again"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_caught(mistake):
    edit, sentence = MISTAKES[mistake]
    files = ("library.cpp", "common/cuda/host.cpp", "interflow_head/cuda/pool.cpp", "interflow_head/cuda/pool.cu")
    mutant = cuda_emulation.load(cuda_emulation.sources(*files), edits=[edit])
    maps = head_inputs(HeadCase(batch=50, maps=((16, 48, 48), (8, 3, 3)), layout="channels_last"))
    with cuda_emulation.emulated(mutant, 3, 0), pytest.raises(RuntimeError, match=sentence):
        mutant.ops.interflow_pool(maps, [1, 1])
