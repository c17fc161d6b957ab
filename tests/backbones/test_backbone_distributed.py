"""An attached network under DDP and FSDP2 on two processes: logits and each gradient by name are those of one process in plain PyTorch."""

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from interflow_vision import InterflowNetwork, attach

WORLD = 2


class Block(nn.Module):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.down, self.conv, self.relu = nn.Conv2d(a, b, 3, 2, 1), nn.Conv2d(b, b, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return self.relu(self.conv(x) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = Block(3, 8), Block(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.two(self.one(x)).mean((2, 3)))


def network(**options) -> InterflowNetwork:
    torch.manual_seed(0)
    return attach(Net(), 4, stages=["one", "two"], input_size=16, **options)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2 * WORLD, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(2 * WORLD) % 4


def step(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    y = net(x)
    F.cross_entropy(y, target).backward()
    return y.detach()


def frozen_rest(net: InterflowNetwork) -> nn.Module:
    for name in net.unused_parameters():
        net.get_parameter(name).requires_grad_(False)
    return DistributedDataParallel(net)


def unused_allowed(net: InterflowNetwork) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=True)


def sharded(net: InterflowNetwork) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(net.backbone.one, mesh=mesh)
    return fully_shard(net, mesh=mesh)


KINDS = {f.__name__: f for f in (frozen_rest, unused_allowed, sharded)}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name.removeprefix("module."): p.grad for name, p in net.named_parameters() if p.grad is not None and ".fc." not in name}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def rank_of(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        x, target = batch()
        own = slice(2 * rank, 2 * rank + 2)
        eager = network(head="eager", stage_end="eager")
        want = step(eager, x, target)
        expected = gradients(eager)
        for kind, wrap in KINDS.items():
            net = network()
            assert len(net.replaced) == 2
            wrapped = wrap(net)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                got = step(wrapped, x[own], target[own])
            torch.testing.assert_close(got, want[own], rtol=1e-4, atol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}")
            told = [str(w.message) for w in said if "do not depend" in str(w.message)]
            assert (told != []) == (kind == "unused_allowed"), (kind, told)
            if told:
                assert told[0].startswith("the maps do not depend on these parameters of the backbone: fc.weight, fc.bias; give DistributedDataParallel")
            found = gradients(wrapped)
            assert found.keys() == expected.keys(), kind
            for name, gradient in expected.items():
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, key=f"{kind}, {name}": f"{key}: {m}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_give_what_one_gives(tmp_path: Path):
    torch.multiprocessing.spawn(rank_of, (str(tmp_path / "store"),), nprocs=WORLD)
