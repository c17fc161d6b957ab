"""VGG under DDP, FSDP and FSDP2 on two processes: logits and each gradient by name are those of one process with eager stages."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from interflow_vision import VGG, create_model

WORLD = 2


def model(stage: str) -> VGG:
    """Biases are far from zero."""
    torch.manual_seed(0)
    net = create_model("vgg16", width=1 / 32, stage=stage)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.linspace(-0.5, 1, len(parameter)))
    return net


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2 * WORLD, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(2 * WORLD)


def gradients(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Runs a backward; the logits."""
    y = net(x)
    F.cross_entropy(y, target).backward()
    return y.detach()


def data_parallel(net: VGG) -> nn.Module:
    return DistributedDataParallel(net)


def sharded_convolutions(net: VGG) -> nn.Module:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in net.features.values():
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def sharded_whole(net: VGG) -> nn.Module:
    return fully_shard(net, mesh=init_device_mesh("cpu", (WORLD,)))


def wrapped_convolutions(net: VGG) -> nn.Module:
    """FSDP of the first kind on the convolutions before taps and one more, and on the whole."""
    options = {"use_orig_params": True, "device_id": torch.device("cpu")}
    for name in ("0", "2", "7", "14"):
        net.features[name] = FullyShardedDataParallel(net.features[name], **options)
    return FullyShardedDataParallel(net, **options)


def full_gradients(net: nn.Module) -> dict[str, Tensor]:
    """By the names of the network that was wrapped."""
    if isinstance(net, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(net, with_grads=True):
            found = {name: p.grad.clone() for name, p in net.named_parameters()}
    else:
        found = {name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in net.named_parameters()}
    return {name.replace("_fsdp_wrapped_module.", "").removeprefix("module."): g for name, g in found.items()}


KINDS = {f.__name__: f for f in (data_parallel, sharded_convolutions, sharded_whole, wrapped_convolutions)}


def rank_of(rank: int, store: str, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        x, target = batch()
        own = slice(2 * rank, 2 * rank + 2)
        eager = model("eager")
        want = gradients(eager, x, target)
        for kind in kinds:
            net = KINDS[kind](model("fused"))
            got = gradients(net, x[own], target[own])
            torch.testing.assert_close(got, want[own], rtol=1e-4, atol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}")
            found = full_gradients(net)
            assert set(found) == {name for name, _ in eager.named_parameters()}, kind
            for name, parameter in eager.named_parameters():
                torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=lambda m, key=f"{kind}, {name}": f"{key}: {m}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_give_what_one_gives(tmp_path: Path):
    torch.multiprocessing.spawn(rank_of, (str(tmp_path / "store"), list(KINDS)), nprocs=WORLD)
