"""Operators on DTensors in two processes: results and each gradient by name are those of one process. What needs whole parameters says so."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from interflow_kernels import FusedInterflowHead, stage_end, stage_tap
from interflow_kernels.functional import run_pool
from interflow_kernels.testing import ATTENTIONS

WORLD = 2
MAPS = ((4, 6, 5), (8, 3, 3))
CLASSES = 5  # of which one process has more


def head(attention):
    torch.manual_seed(0)
    made = FusedInterflowHead(tuple(each[0] for each in MAPS), CLASSES, attention)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return made


def maps(batch):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, *each, generator=generator) for each in MAPS]


def splits(attention, by):
    """The placements of the head's parameters and features."""
    if by == "image":
        return {}, Shard(0)
    classwise = {"attention_weight": Shard(1)} if attention == "classwise" else {}
    return {"weight": Shard(0), "bias": Shard(1), **classwise}, Replicate()


def sharded_head(mesh, attention, by):
    made = head(attention)
    parameters, features = splits(attention, by)
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        shard = distribute_tensor(tensor.detach(), mesh, [parameters.get(name, Replicate())])
        setattr(made, name, torch.nn.Parameter(shard) if isinstance(tensor, torch.nn.Parameter) else shard)
    return made, [distribute_tensor(x, mesh, [features]).requires_grad_() for x in maps(3)]


def compare(what, got, want):
    got = got.full_tensor() if hasattr(got, "full_tensor") else got
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=lambda m: f"{what}: {m}")


def check_head(mesh, attention, by):
    whole, xs = head(attention), [x.requires_grad_() for x in maps(3)]
    want = whole.forward_branches(xs)
    F.cross_entropy(want[0], torch.arange(3)).backward(retain_graph=True)
    want[1].sin().sum().backward()
    made, shards = sharded_head(mesh, attention, by)
    y, branches = made.forward_branches(shards)
    expected = {"image": (Shard(0), Shard(0)), "class": (Shard(1), Shard(2))}[by]
    assert (y.placements[0], branches.placements[0]) == expected, (y.placements, branches.placements)
    compare(f"{attention} by {by}: y", y, want[0])
    compare(f"{attention} by {by}: Z", branches, want[1])
    leaf = want[0].detach().requires_grad_()
    (dy,) = torch.autograd.grad(F.cross_entropy(leaf, torch.arange(3)), leaf)
    gradients = [distribute_tensor(dy, mesh, [Replicate()]), distribute_tensor(want[1].detach().cos(), mesh, [Replicate()])]
    torch.autograd.backward([y, branches], gradients)
    for name, parameter in whole.named_parameters():
        compare(f"{attention} by {by}: {name}", made.get_parameter(name).grad, parameter.grad)
    for i, (got, x) in enumerate(zip(shards, xs, strict=True)):
        compare(f"{attention} by {by}: features[{i}]", got.grad, x.grad)
    with torch.no_grad():
        compare("without a graph", made(shards), want[0])


def check_tap(mesh, max_pool):
    u, shift = torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(2)), torch.linspace(-1, 1, 4)
    leaf, bias = u.clone().requires_grad_(), shift.clone().requires_grad_()
    m, p = stage_tap(leaf, bias, max_pool=max_pool)
    (p.sin().sum() + (0 if m is None else m.square().sum())).backward()
    split, whole = distribute_tensor(u, mesh, [Shard(0)]).requires_grad_(), distribute_tensor(shift, mesh, [Replicate()]).requires_grad_()
    m2, p2 = stage_tap(split, whole, max_pool=max_pool)
    assert p2.placements == (Shard(0),)
    compare("p", p2, p)
    (p2.sin().sum() + (0 if m2 is None else m2.square().sum())).backward()
    compare("u", split.grad, leaf.grad)
    compare("shift", whole.grad, bias.grad)
    if max_pool:
        compare("m", m2, m)


def check_end(mesh, activation):
    u, added = torch.randn(2, 3, 4, 6, 6, generator=torch.Generator().manual_seed(3))
    whole = [t.clone().requires_grad_() for t in (u, torch.linspace(-1, 1, 4), added)]
    shards = [distribute_tensor(t.detach(), mesh, [place]).requires_grad_() for t, place in zip(whole, (Shard(0), Replicate(), Shard(0)), strict=True)]
    results = [stage_end(*arguments, activation=activation) for arguments in (whole, shards)]
    for v, p in results:
        (p.sin().sum() + v.square().sum()).backward()
    for name, got, want in zip(("v", "p"), results[1], results[0], strict=True):
        assert got.placements == (Shard(0),)
        compare(name, got, want)
    for name, got, want in zip(("u", "shift", "residual"), shards, whole, strict=True):
        compare(f"{activation}: {name}", got.grad, want.grad)


def check_pool(mesh, pool_size):
    whole = [x.requires_grad_() for x in maps(3)]
    shards = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in whole]
    pooled = [run_pool(features, pool_size) for features in (whole, shards)]
    assert pooled[1].placements == (Shard(0),)
    compare("pooled", pooled[1], pooled[0])
    for p in pooled:
        p.sin().sum().backward()
    for i, (got, want) in enumerate(zip(shards, whole, strict=True)):
        compare(f"features[{i}]", got.grad, want.grad)


def check_sentences(mesh):
    made, shards = sharded_head(mesh, "nxn", "class")
    for what, call in (("fold", made.fold), ("stage_weights", made.stage_weights)):
        with pytest.raises(ValueError, match=rf"^{what} needs whole parameters, but weight is a DTensor, .*; gather first: head.unshard\(\) under FSDP2"):
            call()
    with pytest.raises(RuntimeError, match=r"got mixed torch.Tensor and DTensor|features must be a DTensor where other tensors are, got a plain one"):
        made([shards[0], maps(3)[1]])


def rank_of(rank, store, every):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        for attention in ATTENTIONS if every else ("classwise", "gated"):
            for by in ("image", "class"):
                check_head(mesh, attention, by)
        for max_pool in (True, False):
            check_tap(mesh, max_pool)
        for activation in ("relu", "none"):
            check_end(mesh, activation)
        for pool_size in ((1, 1), (2, 1)):
            check_pool(mesh, pool_size)
        check_sentences(mesh)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two modes", "all modes"])
def test_two_processes_give_what_one_gives(every, tmp_path):
    torch.multiprocessing.spawn(rank_of, (str(tmp_path / "store"), every), nprocs=WORLD)


def test_a_part_of_a_parameter_is_refused_in_a_sentence():
    """As FSDP of the first kind leaves them outside of forward."""
    made = FusedInterflowHead((4, 8), 3)
    made.weight = torch.nn.Parameter(torch.empty(18))
    with pytest.raises(ValueError, match=r"^fold needs whole parameters, but weight has shape \(18,\) instead of \(3, 12\); gather first"):
        made.fold()
