"""The operators on a GPU. Each test has a twin on the CPU where that is cheap: it shows that the test itself is right."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch

from interflow_kernels import backend

GPU = pytest.param("cuda", marks=pytest.mark.gpu)
POISON = ((64, 1 << 20), (6, 48 << 20))  # blocks and their bytes: of the allocator's small and large blocks


@pytest.fixture(params=["cpu", GPU])
def device(request):
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture(autouse=True)
def _native_on_poisoned_memory(request):
    """The compiled kernels or an error, never a fallback. On a GPU the memory that the next tensors get is full of NaN."""
    with backend("native"):
        if "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda":
            poison()
        yield


@pytest.fixture
def most_of_the_memory(device):
    """For a test that takes tens of GiB: of those that run at the same time in several processes, one at a time has it."""
    if device.type == "cpu":
        yield
        return
    with open(Path(tempfile.gettempdir()) / "interflow-gpu-memory.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def poison() -> None:
    """0xFF in all that the caching allocator gives out next: an output or workspace that nobody wrote shows as NaN."""
    torch.cuda.empty_cache()
    kept = [torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda") for count, size in POISON for _ in range(count)]
    torch.cuda.synchronize()
    del kept
