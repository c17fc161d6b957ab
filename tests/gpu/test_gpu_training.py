"""Ways to train and to serve on a GPU: torch.compile with CUDA graphs, a captured training step, autocast with a GradScaler, several GPUs.

Each runs on a CPU too, where a graph is the call itself, so that no test meets a GPU with a mistake of its own.
"""

import copy
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interflow_kernels import FusedInterflowHead, StageTap, conv_tap

SEVERAL = [pytest.param("gloo", id="gloo"), pytest.param("nccl", marks=pytest.mark.gpu, id="nccl")]


class Small(nn.Module):
    """Two stages that end in taps, and a head on their means."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 24, 3, padding=1)
        self.tap, self.last, self.head = StageTap(), StageTap(max_pool=False), FusedInterflowHead((16, 24), 10)

    def forward(self, x):
        m, p = conv_tap(self.first, self.tap, x)
        _, q = conv_tap(self.second, self.last, m)
        return self.head([p, q])


@pytest.fixture
def small(device):
    """The network, images and targets; sums of convolutions in fp32 and in the same order every time."""
    torch.manual_seed(0)
    net = Small().to(device, memory_format=torch.channels_last)
    x = torch.randn(8, 3, 32, 32).to(device, memory_format=torch.channels_last)
    with exact_convolutions():
        yield net, x, torch.arange(8, device=device)


@contextmanager
def exact_convolutions():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def stepped(net, x, target, optimizer):
    """A training step -> its loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(net(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


def assert_near(name, got, want, tolerance=1e-5):
    got, want = got.detach(), want.detach()
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    assert error <= tolerance, f"{name}: {error:.1e} of the norm"


# --- torch.compile in CUDA graphs ---------------------------------------------------------------------------------------
def in_graphs(net, device):
    """On a GPU compiled into CUDA graphs; on a CPU traced alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(net, fullgraph=True, **({"mode": "reduce-overhead"} if device.type == "cuda" else {"backend": "aot_eager"}))


def assert_no_graph_was_left_out():
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_reduce_overhead_training(small, device):
    net, x, target = small
    plain = copy.deepcopy(net)
    compiled = in_graphs(net, device)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, plain)]
    for step in range(6):  # recorded by the third, replayed from then on
        x = torch.randn(x.shape).to(x)
        torch.compiler.cudagraph_mark_step_begin()
        losses = [stepped(n, x, target, o) for n, o in zip((compiled, plain), optimizers, strict=True)]
        assert_near(f"loss of step {step}", *losses, 1e-4)
    for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert_near(name, a, b, 1e-4)
    assert_no_graph_was_left_out()


def test_reduce_overhead_inference(small, device):
    net, x, _ = small
    compiled = in_graphs(net, device)
    with torch.inference_mode():
        for _ in range(6):
            x = torch.randn(x.shape).to(x)
            torch.compiler.cudagraph_mark_step_begin()
            assert_near("logits", compiled(x).clone(), net(x))
    assert_no_graph_was_left_out()


# --- a captured training step -------------------------------------------------------------------------------------------
def captured(step, device):
    """A function that replays the step, and how often the step ran before; on a CPU the step itself."""
    if device.type == "cpu":
        return step, 0
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    return graph.replay, 3


def test_a_whole_training_step_in_a_graph(small, device):
    """Forward, backward and optimizer replayed over new images: the parameters are those of the same steps without a graph."""
    net, x, target = small
    plain = copy.deepcopy(net)
    mine, theirs = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, plain))
    replay, before = captured(lambda: stepped(net, x, target, mine), device)
    for _ in range(before):
        stepped(plain, x, target, theirs)
    for _ in range(4):
        x.copy_(torch.randn(x.shape))
        start = [p.detach().clone() for p in net.parameters()]
        replay()
        stepped(plain, x, target, theirs)
        for (name, a), b, was in zip(net.named_parameters(), plain.parameters(), start, strict=True):
            assert_near(name, a, b)
            assert not torch.equal(a, was), f"{name} did not move"


# --- autocast and GradScaler ----------------------------------------------------------------------------------------------
def test_grad_scaler_skips_the_step_that_overflows(small, device):
    """Under fp16 autocast: a scale beyond fp16 makes gradients infinite, the step is left out and the scale shrinks; then training goes on."""
    net, x, target = small
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60, backoff_factor=2.0**-50, growth_interval=1000)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16):
            y = net(x)
            loss = F.cross_entropy(y, target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return y

    start = {name: p.detach().clone() for name, p in net.named_parameters()}
    y = step()
    assert y.dtype == torch.float16 and all(p.grad.dtype == torch.float32 for p in net.parameters())
    assert not net.head.weight.grad.isfinite().all()
    for name, p in net.named_parameters():
        assert torch.equal(p, start[name]), f"{name} moved in the step that overflowed"
    assert scaler.get_scale() == 2.0**10
    step()
    assert scaler.get_scale() == 2.0**10
    exact = copy.deepcopy(net).double()
    exact.load_state_dict({name: t.double() for name, t in start.items()}, strict=False)
    with torch.no_grad():
        logits = exact.cpu().head.to_eager()  # fp64 on a GPU takes PyTorch's operators; here by hand, on the CPU
        v = F.relu(F.conv2d(x.cpu().double(), exact.first.weight, exact.first.bias, padding=1))
        w = F.relu(F.conv2d(F.max_pool2d(v, 2, 2), exact.second.weight, exact.second.bias, padding=1))
        wanted = logits([v.mean((2, 3)), w.mean((2, 3))])
    assert_near("logits", y.detach().cpu(), wanted, 5e-3)
    for name, p in net.named_parameters():
        assert p.isfinite().all() and not torch.equal(p, start[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_training_is_near_fp32(dtype, small, device):
    net, x, target = small
    F.cross_entropy(net(x), target).backward()
    wanted = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad(set_to_none=True)
    with torch.autocast(device.type, dtype):
        loss = F.cross_entropy(net(x), target)
    (loss * 1024).backward()
    for name, p in net.named_parameters():
        assert_near(name, p.grad / 1024, wanted[name], 16 * torch.finfo(dtype).eps)


# --- several GPUs -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", SEVERAL)
def test_data_parallel_gradients_are_those_of_the_whole_batch(backend, tmp_path):
    """Two processes, each with half of the batch, average their gradients (DistributedDataParallel)."""
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs for NCCL, {torch.cuda.device_count()} here")
    program = str(Path(__file__).with_name("data_parallel.py"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "INTERFLOW_BACKEND": "native"}
    ranks = [
        subprocess.Popen(
            [sys.executable, program, backend, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-2000:] for text in said)
    assert all(text.splitlines()[-1] == "same" for text in said)
