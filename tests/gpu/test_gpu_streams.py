"""Streams, graphs, memory and devices: what a GPU adds to being right."""

import subprocess
import sys

import pytest
import torch
from on_device import assert_equal_bits, head_bits, head_on, tap_bits, tap_on, tap_upstream, upstream

from interflow_kernels import FusedInterflowHead, stage_tap
from interflow_kernels.testing import HeadCase, TapCase, assert_same_bits

pytestmark = pytest.mark.gpu
MAPS = ((64, 56, 56), (128, 28, 28), (48, 7, 7))


def work(seed, layout="channels_last", device="cuda"):
    """A function that runs both operators forward and backward over inputs of its own -> every result by name."""
    case = HeadCase(17, MAPS, 100, layout=layout, dtype=torch.bfloat16, attention="gated" if seed % 2 else "nxn")
    plain, maps = head_on(case, device, seed)
    head, (dy, dz) = FusedInterflowHead.from_eager(plain), upstream(case, device)
    u, shift = tap_on(TapCase((17, 64, 56, 56), torch.bfloat16, layout), device, seed)
    dm, dp = tap_upstream(u, True)

    def run():
        return head_bits(head, maps, dy, dz) | {f"tap {name}": t for name, t in tap_bits(u, shift, True, dm, dp).items()}

    return run


def captured(run):
    """A graph of `run`, and the results that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        results = run()
    return graph, results


def test_two_streams_at_once():
    runs = [work(0), work(1)]
    expected = [run() for run in runs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    found = []
    for _ in range(20):
        for run, stream in zip(runs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(run())
    torch.cuda.synchronize()
    for i, results in enumerate(found):
        assert_equal_bits(expected[i % 2], results)


def test_two_graphs_at_once_and_beside_eager_calls():
    runs = [work(0), work(1), work(2)]
    expected = [run() for run in runs]
    graphs = [captured(run) for run in runs[:2]]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    for _ in range(20):
        for _, results in graphs:
            for t in results.values():
                t.fill_(float("nan"))
        torch.cuda.synchronize()
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        eager = runs[2]()
        torch.cuda.synchronize()
        assert_equal_bits(expected[2], eager)
        for i, (_, results) in enumerate(graphs):
            assert_equal_bits(expected[i], results)


def test_a_graph_of_many_calls():
    case = HeadCase(4, MAPS, 10, dtype=torch.bfloat16, layout="channels_last")
    plain, maps = head_on(case, "cuda")
    head = FusedInterflowHead.from_eager(plain)
    expected = head(maps).detach()
    with torch.no_grad():
        graph, results = captured(lambda: {str(i): head(maps) for i in range(200)})
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for y in results.values():
        assert_same_bits("y", y, expected)


FIRST = """
import torch
from interflow_kernels import FusedInterflowHead, backend, stage_tap
torch.manual_seed(0)
maps = [torch.randn(4, c, s, s, device="cuda", dtype=torch.bfloat16) for c, s in ((64, 56), (128, 28))]
head = FusedInterflowHead((64, 128), 10, device="cuda", dtype=torch.bfloat16)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with backend("native"), torch.no_grad():
    with torch.cuda.graph(graph):
        y = head(maps)
        m, p = stage_tap(maps[0])
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, head(maps))
    assert torch.equal(m, stage_tap(maps[0])[0]) and torch.equal(p, stage_tap(maps[0])[1])
print("same")
"""


def test_capture_may_be_the_very_first_call_of_a_process():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_nothing_waits_for_the_device():
    run = work(0)
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_after_a_kernel_that_keeps_every_processor_busy():
    run = work(0)
    expected = run()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        hog = torch.randn(4096, 4096, device="cuda")
        for _ in range(10):
            hog = hog @ hog / 64
    assert_equal_bits(expected, run())
    torch.cuda.synchronize()


def test_out_of_memory_leaves_the_process_usable():
    run = work(0)
    expected = run()
    u = torch.empty(1, 1, 1, 1, device="cuda").expand(4096, 512, 512, 512)  # its m would take 512 GiB
    head = FusedInterflowHead((8,), 2**20, device="meta").to_empty(device="cuda")
    for call in (lambda: stage_tap(u), lambda: head([torch.zeros(2**20, 8, 1, 1, device="cuda")])):
        with pytest.raises((torch.OutOfMemoryError, RuntimeError)):
            call()
    torch.cuda.empty_cache()
    assert_equal_bits(expected, run())


def test_the_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here, this needs two")
    expected, found = work(0, device="cuda:0")(), work(0, device="cuda:1")()  # the first GPU stays the current one
    assert all(t.device == torch.device("cuda", 1) for t in found.values())
    assert_equal_bits({name: t.cpu() for name, t in expected.items()}, {name: t.cpu() for name, t in found.items()})
    plain, maps = head_on(HeadCase(), "cuda:0")
    with pytest.raises(ValueError, match=r"features\[1\] must be on the device of weight, cuda:0, got cuda:1"):
        FusedInterflowHead.from_eager(plain)([maps[0], maps[1].to("cuda:1"), maps[2]])
