"""One of two processes that train side by side: python data_parallel.py BACKEND RANK FILE. Prints "same" where its gradients are those of the whole batch."""

import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_gpu_training import Small, exact_convolutions
from torch.nn.parallel import DistributedDataParallel

backend, rank, meeting = sys.argv[1], int(sys.argv[2]), sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=2)
torch.manual_seed(0)
alone = Small().to(device)
x, target = torch.randn(8, 3, 32, 32).to(device), torch.arange(8, device=device)
shared = DistributedDataParallel(Small().to(device), device_ids=[rank] if device.type == "cuda" else None)
shared.module.load_state_dict(alone.state_dict())
mine = slice(4 * rank, 4 * rank + 4)
with exact_convolutions():
    F.cross_entropy(alone(x), target).backward()
    F.cross_entropy(shared(x[mine]), target[mine]).backward()
for (name, a), b in zip(shared.module.named_parameters(), alone.parameters(), strict=True):
    error = float((a.grad - b.grad).norm() / b.grad.norm())
    assert error < 1e-5, f"{name}: {error:.1e} of the norm"
dist.barrier()
dist.destroy_process_group()
print("same")
