"""Runs on a GPU, or with TRITON_INTERPRET=1 on the CPU (as tests/test_triton.py does in a process of its own); else not collected."""

import os

import matrix_units
import numpy as np
import pytest
import torch

from interflow_kernels import backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def product_in_order(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """a b + d: parts in bf16 as NVIDIA's matrix units add them, else each element's products in the order of the inner dimension.

    The interpreter multiplies with NumPy's BLAS. There the order of a sum depends on the matrix's shape and on the processor, so
    a row's bits would depend on the other rows of its tile. On a GPU they do not, and the tests hold the kernels to that.
    """
    if all(map(matrix_units.of_bf16, (a.data, b.data))):
        return type(d)(matrix_units.multiply_add(a.data, b.data, d.data), d.dtype.scalar)
    total = np.zeros(d.data.shape, d.data.dtype)
    for k in range(a.data.shape[-1]):
        total += a.data[..., :, k, None].astype(total.dtype) * b.data[..., k, None, :].astype(total.dtype)
    return type(d)(total + d.data, d.dtype.scalar)


if INTERPRETED:
    from triton.runtime import interpreter

    interpreter.InterpreterBuilder.create_dot = product_in_order


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
