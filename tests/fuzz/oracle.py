"""What should come out of a call: the definitions in fp64 with the tolerance table, and the errors that are known."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from interflow_kernels import InterflowHead, _validate
from interflow_kernels.testing import assert_close, assert_same_bits, gradients, magnitudes

from ..stage_tap_cases import biased, composed, exact_gradient

Named = dict[str, Tensor]


@dataclass
class Expected:
    """By name: values in fp64 and what their errors are measured beside; names whose bits must be PyTorch's."""

    values: Named
    magnitudes: Named = field(default_factory=dict)
    bits: Named = field(default_factory=dict)
    accumulation: torch.dtype = torch.float32


@dataclass
class Call:
    """One drawn call: `run` makes it and returns results by name; `expect` computes what they should be, or raises where the definition refuses."""

    arguments: dict[str, Any]
    run: Callable[[], dict[str, Tensor | None]]
    expect: Callable[[], Expected]
    broken: tuple[str, ...] = ()  # arguments that were replaced by (probably) wrong ones


# --- errors ---------------------------------------------------------------------------------------------------------------
_SENTENCE = re.compile(
    r" must (be|all be|have|name|give|add up|both)\b| no memory for | cannot be folded|are tokens .* pool_size must be 1"
    r"|double backward is not implemented|was asked for but cannot run on"
)
_DISPATCHER = (
    re.compile(r"interflow_kernels::\w+\(\) (Expected|expected|is missing|got)"),  # the schema's types
    re.compile(r"Could not run '.*' with arguments from the 'QuantizedMeta' backend"),  # a key that torch does not let us answer for
    re.compile(r"There were no tensor arguments to this function"),
    re.compile(r"interflow_kernels\.\w+\.default$"),  # a tensor subclass (jagged) that knows no operator of ours
    re.compile(r"call, .*Not yet supported ScalarType"),  # torch's own conversion of dtypes
    re.compile(r"\[enforce fail at alloc_cpu.cpp.*DefaultCPUAllocator: "),  # plain PyTorch, where it was asked for, on what fits into no memory
    re.compile(r"Target -?\d+ is out of bounds"),  # cross_entropy's own
)


def complaint(error: BaseException) -> str | None:
    """None where an error is of a known kind and one sentence of ours, or the dispatcher's about a type; else what is wrong with it."""
    text = str(error)
    if not isinstance(error, (TypeError, ValueError, RuntimeError, IndexError)):
        return f"an error of kind {type(error).__name__}: {text[:300]}"
    if any(pattern.match(text) for pattern in _DISPATCHER):
        return None
    if "\n" in text or len(text) > 500 or not _SENTENCE.search(text) or re.search(r"\.(h|cpp|py):\d+", text):
        return f"no sentence of ours: {type(error).__name__}: {text[:300]}"
    return None


# --- comparison -----------------------------------------------------------------------------------------------------------
def difference(results: dict[str, Tensor | None], expected: Expected) -> str | None:
    """None where every result is as expected, else the worst element of the first that is not."""
    for name, actual in results.items():
        if actual is None or actual.is_meta:
            continue
        try:
            if name in expected.bits:
                assert_same_bits(name, actual, expected.bits[name])
                continue
            wanted = expected.values[name]
            if actual.dtype == torch.float64:
                actual = actual.to(expected.accumulation)
            if actual.shape == wanted.shape:  # sums of subnormal numbers lose more than one of their steps
                info = torch.finfo(actual.dtype)
                near = (actual.double() - wanted).abs() <= 64 * info.smallest_normal * info.eps
                actual = torch.where(near, wanted.to(actual.dtype), actual)
            # What is expected is itself in fp64: beside it fp64 may differ by the errors of both.
            assert_close(name, actual, wanted, 1e-14 if actual.dtype == torch.float64 else None, expected.magnitudes.get(name))
        except (AssertionError, KeyError) as error:
            return f"{type(error).__name__}: {error}"
    return None


# --- the head -------------------------------------------------------------------------------------------------------------
class _Definition(InterflowHead):
    """The plain head, on any stages."""

    def _checked(self, features: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
        return list(features)


def _refuse_unless(condition: bool) -> None:
    if not condition:
        raise ValueError("the definition does not take this")


def head(
    features: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    attention_weight: Tensor | None,
    attention_bias: Tensor | None,
    attention: str,
    pool_size: Any,
    dy: Tensor | None = None,
    dbranches: Tensor | None = None,
) -> Expected:
    """y, branches and every gradient by the names of `gradients`, in fp64."""
    attention = attention.decode() if isinstance(attention, bytes) else attention  # as the dispatcher takes it
    pool = (int(pool_size[0]), int(pool_size[1])) if hasattr(pool_size, "__len__") and len(pool_size) == 2 else (int(pool_size), int(pool_size))
    for t in (*features, weight, bias, attention_weight, attention_bias, dy, dbranches):
        if t is not None:
            _validate.floating(t, "it")
    n, k = len(features), weight.shape[0]
    widths = [x.shape[1] * (pool[0] * pool[1] if x.dim() == 4 else 1) for x in features]
    _refuse_unless(1 <= n <= 16 and k > 0 and tuple(weight.shape) == (k, sum(widths)) and len({x.shape[0] for x in features}) == 1)
    _refuse_unless(all(x.dim() == 2 or (x.dim() == 4 and min(x.shape[2:]) > 0) for x in features))
    _refuse_unless(bias is None or tuple(bias.shape) == (n, k))
    if attention == "folded":  # y = sum_i z_i + c
        _refuse_unless(attention_weight is None)
        attention, attention_weight = "classwise", torch.ones(n, k)
    _refuse_unless(attention_weight is not None)
    weight_shape, bias_shape = _validate.attention_shapes(attention, n, k)
    _refuse_unless(tuple(attention_weight.shape) == weight_shape and (attention_bias is None or tuple(attention_bias.shape) == bias_shape))
    _refuse_unless(attention != "gated" or attention_bias is not None)
    if attention == "hard":  # the same with a weight that may be differentiated
        attention = "1xn"
    definition = _Definition((1,) * n, k, attention, bias=bias is not None, attention_bias=attention_bias is not None, dtype=torch.float64)
    definition.pool_size, definition.widths = pool, tuple(widths)
    for name, t in (("weight", weight), ("bias", bias), ("attention_weight", attention_weight), ("attention_bias", attention_bias)):
        definition._parameters[name] = None if t is None else nn.Parameter(t.detach().double())
    exact = [x.detach().double() if x.shape[1] else torch.empty(x.shape[0], 0, dtype=torch.float64) for x in features]
    up = [None if g is None else g.double() for g in (dy, dbranches)]
    if up == [None, None]:
        up[0] = torch.zeros(exact[0].shape[0], k, dtype=torch.float64)
    outputs, grads = gradients(definition, exact, *up)
    accumulation = torch.float64 if weight.dtype == torch.float64 else torch.float32
    shapes = {f"features[{i}]": x.shape for i, x in enumerate(features)} | {name: t.shape for name, t in definition.named_parameters()}
    zeros = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}  # of what nothing flows into
    found = {name: g for name, g in grads.items() if g is not None and g.numel() and (dy is not None or dbranches is not None)}
    return Expected(zeros | outputs | found, zeros | magnitudes(definition, exact, *up), {}, accumulation)


def _resolved(t: Tensor) -> Tensor:
    """t as numbers in memory. PyTorch adds its zero tensors (_efficientzerotensor) without adding: -0 + 0 stays -0."""
    return torch.zeros(t.shape, dtype=t.dtype) if t._is_zerotensor() else t.detach().resolve_neg()


# --- the tap --------------------------------------------------------------------------------------------------------------
def tap(u: Tensor, shift: Tensor | None, max_pool: bool, dm: Tensor | None = None, dp: Tensor | None = None) -> Expected:
    """m to PyTorch's bits; p, du and dshift in fp64."""
    _validate.tap(u, shift)
    u, shift = _resolved(u), None if shift is None else _resolved(shift)
    if u.numel():
        v, m = composed(u, shift, max_pool)
    else:
        v = biased(u, shift)
        m = u.new_empty((*u.shape[:2], u.shape[2] // 2, u.shape[3] // 2)) if max_pool else None
    mean = v.double().mean((2, 3))
    accumulation = torch.float64 if u.dtype == torch.float64 else torch.float32
    expected = Expected({"p": mean}, {"p": mean}, {} if m is None else {"m": m}, accumulation)
    if dm is None and dp is None:
        return expected
    if u.numel():
        du = exact_gradient(u, shift, max_pool, dm, dp)
        size = exact_gradient(u, shift, max_pool, *(None if g is None else g.abs() for g in (dm, dp)))
    else:
        du = size = torch.zeros(u.shape, dtype=torch.float64)
    expected.values |= {"du": du, "dshift": du.sum((0, 2, 3))}
    expected.magnitudes |= {"du": size, "dshift": size.sum((0, 2, 3))}
    return expected
