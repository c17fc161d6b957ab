"""On a GPU alone: determinism, capture into CUDA graphs, sizes that the interpreter is too slow for."""

import pytest
import torch

from interflow_kernels import FusedInterflowHead, stage_tap
from interflow_kernels.testing import ATTENTIONS, HeadCase, gradients, head_inputs, in_layout

pytestmark = pytest.mark.gpu
MAPS = ((64, 112, 112), (136, 28, 28), (48, 7, 7))


def head_results(case, device):
    head = FusedInterflowHead.from_eager(case.head()).to(device)
    maps = [in_layout(x.to(device), case.layout) for x in head_inputs(case)]
    dy, dz = torch.ones(case.batch, case.classes, device=device), torch.ones(case.batch, len(case.maps), case.classes, device=device)
    return lambda: [t for found in gradients(head, maps, dy.to(case.dtype), dz.to(case.dtype)) for t in found.values() if t is not None]


def tap_results(layout, dtype, device):
    u = in_layout(torch.randn(5, 72, 112, 110, device=device, dtype=dtype), layout).requires_grad_()
    shift = torch.randn(72, device=device, requires_grad=True)

    def run():
        m, p = stage_tap(u, shift)
        return [m.detach(), p.detach(), *torch.autograd.grad([m, p], [u, shift], [torch.ones_like(m), torch.ones_like(p)])]

    return run


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_head_repeats_its_bits(attention, layout, device):
    run = head_results(HeadCase(5, MAPS, 100, attention, layout=layout, dtype=torch.bfloat16), device)
    first = run()
    for repetition in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), repetition


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tap_repeats_its_bits(dtype, layout, device):
    run = tap_results(layout, dtype, device)
    first = run()
    for repetition in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), repetition


@pytest.mark.parametrize("operator", ["head", "tap"])
def test_two_graphs_side_by_side(operator, device):
    """Captured on one stream after a warm-up, replayed on two at once: they must not share counters."""
    if operator == "head":
        run = head_results(HeadCase(5, MAPS, 100, "nxn", layout="channels_last", dtype=torch.bfloat16), device)
    else:
        run = tap_results("channels_last", torch.bfloat16, device)
    expected = run()
    torch.cuda.synchronize()
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        graphs.append((graph, results, torch.cuda.Stream()))
    for repetition in range(50):
        for graph, _, stream in graphs:
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for _, results, _ in graphs:
            assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True)), repetition


def test_two_streams_in_eager(device):
    run = tap_results("channels_last", torch.bfloat16, device)
    expected = run()
    torch.cuda.synchronize()
    found = []
    for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            found += [run() for _ in range(20)]
    torch.cuda.synchronize()
    for results in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, results, strict=True))


def test_maps_beyond_31_bits(device):
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    stage_tap(torch.zeros(2, 128, 112, 112, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last))  # whose code may be for 31 bits
    u = torch.zeros(1400, 128, 112, 112, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    u[-1].fill_(1.0)
    m, p = stage_tap(u)
    assert not m[:-1].any() and m[-1].eq(1).all()
    assert p[-1].eq(1).all() and not p[:-1].any()
