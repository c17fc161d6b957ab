"""Training without Lightning: torchrun --nproc_per_node 2 examples/train_torchrun.py --root /usr/share/datasets/fashion-mnist

A quarter-width VGG-16-BN with Interflow on Fashion-MNIST in plain PyTorch: DDP, a one-cycle learning rate, a checkpoint after
each epoch. Started again it goes on from the checkpoint, so --max-restarts of torchrun survives killed workers. Without
torchrun it trains in one process.
"""

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from interflow_vision import create_model
from interflow_vision.data import FashionMNIST
from interflow_vision.training.optimization import one_cycle


def main() -> None:
    given = argparse.ArgumentParser(description="Trains VGG-16-BN with Interflow on Fashion-MNIST.")
    given.add_argument("--root", default="/usr/share/datasets/fashion-mnist", help="folder of the files")
    given.add_argument("--epochs", type=int, default=10)
    given.add_argument("--batch-size", type=int, default=128, help="of all processes together")
    given.add_argument("--lr", type=float, default=0.1)
    given.add_argument("--width", type=float, default=0.25)
    given.add_argument("--steps", type=int, help="of an epoch, to try things out")
    given.add_argument("--checkpoint", type=Path, default=Path("runs/torchrun/last.pt"))
    options = given.parse_args()

    distributed = "RANK" in os.environ  # torchrun sets it
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if distributed:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    if device.type == "cuda":
        torch.cuda.set_device(device)

    data = FashionMNIST(options.root, mean=[0.286], std=[0.353])
    data.setup()
    training, validation, _ = data.parts
    sampler = DistributedSampler(training, world, rank)
    loader = DataLoader(training, options.batch_size // world, sampler=sampler, drop_last=True, collate_fn=training.collate)
    held_out = DataLoader(validation, 1000, sampler=range(rank, len(validation), world), collate_fn=validation.collate)

    torch.manual_seed(0)  # the same weights everywhere
    model = create_model("vgg16_bn", num_classes=10, in_channels=1, width=options.width).to(device)
    network = DistributedDataParallel(model) if distributed else model
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = min(len(loader), options.steps or len(loader))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step / (options.epochs * steps), warmup=0.25))
    state = {"model": model, "optimizer": optimizer, "schedule": schedule}
    first = load(options.checkpoint, state, device)

    for epoch in range(first, options.epochs):
        began, total = time.perf_counter(), torch.zeros((), device=device)
        network.train()
        sampler.set_epoch(epoch)
        torch.manual_seed(1000 * epoch + rank)  # of the augmentation
        for _, (images, target) in zip(range(steps), loader, strict=False):
            x = data.preprocessing.normalize(images.to(device, non_blocking=True))
            loss = F.cross_entropy(network(x), target.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        right = evaluate(model, data, held_out, device)
        if distributed:
            dist.all_reduce(total)
            dist.all_reduce(right)
        if rank == 0:
            save(options.checkpoint, state, epoch + 1)
            accuracy, loss = right[0] / right[1], total / steps / world
            print(
                f"epoch {epoch + 1}/{options.epochs}   loss {loss:.3f}   validation accuracy {accuracy:.2%}   {time.perf_counter() - began:.1f} s", flush=True
            )
    if distributed:
        dist.destroy_process_group()


@torch.inference_mode()
def evaluate(model: torch.nn.Module, data: FashionMNIST, loader: DataLoader, device: torch.device) -> torch.Tensor:
    """Right answers and images of this process, [2]."""
    model.eval()
    counts = torch.zeros(2, device=device)
    for images, target in loader:
        answer = model(data.preprocessing.normalize(images.to(device))).argmax(1).cpu()
        counts += torch.tensor([float((answer == target).sum()), len(target)], device=device)
    return counts


def save(path: Path, state: dict, epoch: int) -> None:
    """Whole or not at all: written beside, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": epoch, **{name: part.state_dict() for name, part in state.items()}}, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)


def load(path: Path, state: dict, device: torch.device) -> int:
    """Loads what `save` has written; the epoch to go on with, 0 where there is no file."""
    if not path.is_file():
        return 0
    kept = torch.load(path, map_location=device, weights_only=True)
    for name, part in state.items():
        part.load_state_dict(kept[name])
    return kept["epoch"]


if __name__ == "__main__":
    main()
