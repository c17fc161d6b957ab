"""Runs on a GPU, or with TRITON_INTERPRET=1 on the CPU (as tests/test_triton.py does in a process of its own); else not collected."""

import os

import pytest
import torch

from interflow_kernels import backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name != "triton_kernels":
            continue
        if INTERPRETED and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, the interpreter runs on the CPU"))
        elif not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _triton():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with backend("triton"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def device():
    return DEVICE
