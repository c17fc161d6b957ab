"""A training step in two processes is that of one with the whole batch; sharded checkpoints; accelerate. Sharding layer by layer: test_vision_sharded.py."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict, set_model_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from interflow_vision import VGG, create_model

WORLD, STEPS = 2, 2
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}
"""Half batches are summed apart and then together: another order of the same sums. Bits are not the same, a whole batch's numbers are."""


def model() -> VGG:
    """No norms, whose statistics are those of a process's own images."""
    torch.manual_seed(0)
    return create_model("vgg16", "gated", width=1 / 32)


def optimizer_of(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2 * WORLD, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(2 * WORLD)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, target: Tensor, backward=torch.Tensor.backward) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        backward(F.cross_entropy(net(x), target))
        optimizer.step()


def whole(net: nn.Module) -> dict[str, Tensor]:
    """The parameters by the names of the network that was wrapped, gathered."""
    named = {name.removeprefix("module."): p.detach() for name, p in net.named_parameters()}
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone() for name, p in named.items()}


# --- each way to distribute: a network and its optimizer --------------------------------------------------------------------
def data_parallel(net: VGG) -> nn.Module:
    return DistributedDataParallel(net)


def sharded_root(net: VGG) -> nn.Module:
    return fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))


def sharded_head(net: VGG) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(net.head, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_stages(net: VGG) -> nn.Module:
    """The convolutions of each stage in one group, then the head, then the rest."""
    mesh, group = init_device_mesh("cpu", (WORLD,)), []
    for _, place, layer in net.features.placed():
        if isinstance(layer, nn.Conv2d):
            group.append(layer)
        if place.feature:
            fully_shard(group, mesh=mesh)
            group = []
    return sharded_head(net)


KINDS = (data_parallel, sharded_root, sharded_head, sharded_stages)


def compare(kind: str, net: nn.Module, want: dict[str, Tensor], **tolerance: float) -> None:
    found = whole(net)
    assert found.keys() == want.keys(), kind
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, **tolerance, msg=lambda m, key=f"{kind}, {name}": f"{key}: {m}")


def steps(rank: int, want: dict[str, Tensor]) -> None:
    x, target = batch()
    own = slice(2 * rank, 2 * rank + 2)
    for kind in KINDS:
        net = kind(model())
        train(net, optimizer_of(net), x[own], target[own])
        compare(kind.__name__, net, want, **ROUNDING)


def checkpoints(rank: int, folder: Path) -> None:
    """Saved by shards, loaded into another sharding; goes on with the bits of the run that did not stop."""
    x, target = batch()
    own = slice(2 * rank, 2 * rank + 2)
    net = sharded_head(model())
    optimizer = optimizer_of(net)
    train(net, optimizer, x[own], target[own])
    dcp.save({"model": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}, checkpoint_id=folder)
    other = sharded_head(create_model("vgg16", "gated", width=1 / 32))
    its = optimizer_of(other)
    state = {"model": get_model_state_dict(other), "optimizer": get_optimizer_state_dict(other, its)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(other, state["model"])
    set_optimizer_state_dict(other, its, state["optimizer"])
    compare("loaded", other, whole(net), rtol=0, atol=0)
    train(net, optimizer, x[own], target[own])
    train(other, its, x[own], target[own])
    compare("going on", other, whole(net), rtol=0, atol=0)


def with_accelerate(rank: int, want: dict[str, Tensor]) -> None:
    try:
        from accelerate import Accelerator
    except ImportError:
        return  # a test of its own says so
    accelerator = Accelerator(cpu=True)
    assert (accelerator.num_processes, accelerator.process_index) == (WORLD, rank)
    net = model()
    net, optimizer = accelerator.prepare(net, optimizer_of(net))
    x, target = batch()
    own = slice(2 * rank, 2 * rank + 2)
    train(net, optimizer, x[own], target[own], lambda loss: accelerator.backward(loss))
    compare("accelerate", net, want, **ROUNDING)
    bare = accelerator.unwrap_model(net)
    assert type(bare) is VGG
    compare("accelerate, unwrapped", bare, want, **ROUNDING)


def rank_of(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    try:
        one = model()
        train(one, optimizer_of(one), *batch())
        steps(rank, whole(one))
        checkpoints(rank, Path(folder) / "checkpoint")
        with_accelerate(rank, whole(one))
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_train_as_one_and_resume(tmp_path: Path):
    torch.multiprocessing.spawn(rank_of, (str(tmp_path), 29000 + os.getpid() % 1000), nprocs=WORLD)
    # One process, nothing sharded, loads what two have saved by shards.
    net = model()
    state = {"model": get_model_state_dict(net)}
    before = whole(net)
    dcp.load(state, checkpoint_id=tmp_path / "checkpoint")
    set_model_state_dict(net, state["model"])
    one = model()
    train(one, optimizer_of(one), *batch())
    compare("one process", net, whole(one), **ROUNDING)
    assert not torch.equal(before["head.weight"], whole(net)["head.weight"])


def test_accelerate_is_there():
    pytest.importorskip("accelerate", reason="accelerate is not installed (pip install accelerate): test_two_processes_train_as_one leaves it out")
