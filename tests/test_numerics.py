"""No operator's error is more than twice that of eager PyTorch, or 1.5 eps of what the number is made of, on inputs that are hard to sum.

`make numerics` measures the same on larger batches and writes the table in docs/reliability.md.
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import numerics

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = [(operator, dtype, kind) for operator in numerics.OPERATORS for dtype in numerics.DTYPES for kind in numerics.kinds_of(dtype)]


@pytest.mark.parametrize(("operator", "dtype", "kind"), CASES, ids=str)
def test_errors_beside_eager(operator, dtype, kind):
    for name, found in numerics.measured(operator, kind, dtype, scale=16).items():
        assert found.ours <= max(2 * found.eager, 1.5), f"{name}: {found.ours:.3g} eps of {found.numbers} numbers, eager {found.eager:.3g}"


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_an_error_is_seen(dtype):
    exact = torch.tensor([1.0, -3.0, 0.0, 1e30 if dtype != torch.float16 else 1e6], dtype=torch.float64)
    right, eps = exact.to(dtype), torch.finfo(dtype).eps
    assert numerics.error(right, exact, exact.abs()) <= 0.5
    for place, wrong in ((0, 1 + 4 * eps), (1, float("nan")), (2, 1e-3), (3, -float("inf"))):
        changed = right.clone()
        changed[place] = wrong
        assert numerics.error(changed, exact, exact.abs()) > 3, place


@pytest.mark.parametrize("kind", numerics.KINDS)
def test_inputs_are_of_their_kind(kind):
    dtype = torch.float16 if kind == "saturating" else torch.float32
    x = numerics.draw(kind, (4, 8, 6, 6), dtype).double()
    assert x.isfinite().all() and x.unique().numel() > 1
    if kind == "mixed magnitudes":
        assert x.abs().max() / x.abs().min() > 2**25
    if kind == "cancellation":
        assert x.sum((2, 3)).abs().max() < x.abs().sum((2, 3)).min() / 20
    if kind == "subnormals":
        assert (x.abs() < torch.finfo(dtype).smallest_normal).any()
    if kind == "constants":
        assert (x == x[..., :1, :1]).all()
    if kind == "saturating":
        assert x.abs().min() > 32000
