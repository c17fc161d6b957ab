"""A drawer of calls for the stage end: the public function and its raw operators; and what should come out of them."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from interflow_kernels import _options, _validate, backend, stage_end
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.testing import composed_end, exact_end_gradient

from . import values
from .oracle import Call, Expected, _resolved
from .targets import _broken, _flags, _leaf, _tap_arguments, differentiated
from .values import Random, chance

raw = torch.ops.interflow_kernels


def _end(u: Any, shift: Any, residual: Any, activation: Any, dv: Tensor | None = None, dp: Tensor | None = None) -> Expected:
    """v to PyTorch's bits; p and the gradients in fp64."""
    _validate.end(u, shift, residual)
    activation = _options.activation_name(activation.decode() if isinstance(activation, bytes) else activation)
    v = composed_end(*(None if t is None else _resolved(t) for t in (u, shift, residual)), activation)
    wide = v.double()
    expected = Expected({"p": wide.mean((2, 3))}, {"p": wide.abs().mean((2, 3))}, {"v": v}, torch.float64 if u.dtype == torch.float64 else torch.float32)
    if dv is None and dp is None:
        return expected
    du, size = (exact_end_gradient(v, activation, *(None if g is None else f(_resolved(g)) for g in (dv, dp))) for f in (lambda g: g, torch.abs))
    expected.values |= {"du": du, "dshift": du.sum((0, 2, 3)), "dresidual": du}
    expected.magnitudes |= {"du": size, "dshift": size.sum((0, 2, 3)), "dresidual": size}
    return expected


def _arguments(r: Random) -> dict[str, Any]:
    u, shift = _tap_arguments(r)
    residual = values.placed(r, values.numbers(r, tuple(u.shape), u.dtype)) if chance(r, 0.6) else None
    return {"u": u, "shift": shift, "residual": residual, "activation": r.choice(("relu", "relu", "none"))}


def _wrong(r: Random, a: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    good = dict(a)
    wrong: dict[str, Callable[[], Any]] = {name: (lambda name=name: values.wrong_tensor(r, good[name])) for name in ("u", "shift", "residual")}
    return wrong | {"activation": lambda: values.wrong_name(r)}


def _with_gradients(r: Random, a: dict[str, Any], results: dict[str, Any], used: dict[str, Tensor]) -> dict[str, Any]:
    grads, up = differentiated(r, results, {"du": a["u"], "dshift": a["shift"], "dresidual": a["residual"]})
    used.update(up)
    if isinstance(a["residual"], Tensor) and isinstance(a["u"], Tensor) and a["residual"].dtype != a["u"].dtype:
        grads.pop("dresidual", None)  # rounded twice
    return {**results, **grads}


def draw_stage_end(r: Random) -> Call:
    a = _arguments(r)
    if a["residual"] is not None and a["u"].dtype != torch.float64 and chance(r, 0.2):
        a["residual"] = a["residual"].to(r.choice((torch.float32, torch.bfloat16, torch.float16)))
    broken = _broken(r, a, _wrong(r, a))
    a |= {name: _leaf(r, a[name]) for name in ("u", "shift", "residual")}
    way = r.choices(("plain", "inference", "eager"), (8, 1, 1))[0]
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        with ExitStack() as stack:
            if way == "inference":
                stack.enter_context(torch.inference_mode())
            elif way == "eager":
                stack.enter_context(backend("eager"))
            v, p = stage_end(**a)
        results = _with_gradients(r, a, {"v": v, "p": p}, used)
        return {} if way == "eager" else results

    return Call({**a, "way": way}, run, lambda: _end(**a, dv=used.get("v"), dp=used.get("p")), broken)


def draw_raw_stage_end(r: Random) -> Call:
    a = _arguments(r)
    broken = _broken(r, a, _wrong(r, a))
    a |= {name: _leaf(r, a[name], 0.4) for name in ("u", "shift", "residual")}
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        v, p = raw.stage_end(**a)
        return _with_gradients(r, a, {"v": v, "p": p}, used)

    return Call(a, run, lambda: _end(**a, dv=used.get("v"), dp=used.get("p")), broken)


def draw_raw_stage_end_backward(r: Random) -> Call:
    given = _arguments(r)
    u, activation = given["u"], given["activation"]
    v, p = raw.stage_end(**given)
    a: dict[str, Any] = {
        "dv": values.placed(r, values.numbers(r, tuple(v.shape), u.dtype)) if chance(r, 0.7) else None,
        "dp": values.placed(r, values.numbers(r, tuple(p.shape), p.dtype)) if chance(r, 0.7) else None,
        "v": values.placed(r, v) if activation == "relu" else None,
        "like": torch.empty((), dtype=u.dtype).expand(u.shape),
    }
    good = dict(a)
    wrong: dict[str, Callable[[], Any]] = {name: (lambda name=name: values.wrong_tensor(r, good[name])) for name in ("dv", "dp", "v", "like")}
    wrong |= _flags(r, a, ("channels_last", "need_shift"))
    if chance(r, 0.7):
        a["channels_last"] = is_channels_last(u)
    broken = _broken(r, a, wrong)

    def run() -> dict[str, Tensor | None]:
        du, dshift = raw.stage_end_backward(**a)
        if {"v", "like"} & set(broken):  # nothing says what v means then
            return {}
        return {"du": du} | ({"dshift": dshift} if a["need_shift"] else {})

    def expect() -> Expected:
        for name, shape, kind in (("dv", u.shape, u.dtype), ("v", u.shape, u.dtype), ("dp", p.shape, p.dtype)):
            t = a[name]
            if t is not None:
                _validate.floating(t, name)
                if t.shape != shape or t.dtype != kind:
                    raise ValueError("the definition does not take this")
        value = u if a["v"] is None else _resolved(a["v"])
        d, size = (
            exact_end_gradient(value, "none" if a["v"] is None else "relu", *(None if g is None else f(_resolved(g)) for g in (a["dv"], a["dp"])))
            for f in (lambda g: g, torch.abs)
        )
        accumulation = torch.float64 if u.dtype == torch.float64 else torch.float32
        return Expected({"du": d, "dshift": d.sum((0, 2, 3))}, {"du": size, "dshift": size.sum((0, 2, 3))}, {}, accumulation)

    return Call(a, run, expect, broken)
