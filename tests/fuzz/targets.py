"""A drawer of calls for each raw operator and public function: arguments that fit, then now and then one or two that do not."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from interflow_kernels import backend, interflow_head, stage_tap
from interflow_kernels._tap_format import is_channels_last
from interflow_kernels.reference import ATTENTIONS

from . import oracle, values
from .oracle import Call, Expected
from .values import Random, chance

raw = torch.ops.interflow_kernels


# --- the head's arguments ---------------------------------------------------------------------------------------------------
def _special(r: Random, mode: str) -> str:
    """What is strewn into a call of this mode."""
    infinite = values.INFINITE_ATTENTION or mode not in ("nxn", "gated")
    return r.choices(("", "nan", "infinite" if infinite else "nan"), (6, 1, 1))[0]


def head_arguments(r: Random, modes: tuple[str, ...] = ATTENTIONS) -> dict[str, Any]:
    """Features in [B, C, H, W] or [B, D_i] and parameters that fit, all in one dtype."""
    n, batch, classes = r.choices((1, 2, 3, 4, 16), (3, 3, 3, 2, 1))[0], values.size(r, 5), max(1, values.size(r, 30))
    kind, mode = values.dtype(r), r.choice(modes)
    special = _special(r, mode)
    pool = r.choices(((1, 1), (2, 2), (1, 3), (r.randint(1, 6), r.randint(1, 6))), (6, 1, 1, 1))[0]
    features, width = [], 0
    for _ in range(n):
        channels = values.size(r, r.choice((5, 40)))
        if chance(r, 0.25):
            shape: tuple[int, ...] = (batch, channels * pool[0] * pool[1])
        else:
            shape = (batch, channels, max(1, values.size(r, 12)), max(1, values.size(r, 12)))
        features.append(values.placed(r, values.numbers(r, shape, kind, special)))
        width += channels * pool[0] * pool[1]
    k = classes
    weight_shape = {"nxn": (n, n), "gated": (n, n), "classwise": (n, k)}.get(mode, (n,))
    bias_shape = {"1xn": (1,), "nxn": (n,), "gated": (n,), "classwise": (k,), "folded": (k,), "hard": None}[mode]
    has_bias = bias_shape is not None and (mode == "gated" or chance(r, 0.5))

    def parameter(shape: tuple[int, ...], special: str) -> Tensor:
        return values.placed(r, values.numbers(r, shape, kind, special if chance(r, 0.3) else ""))

    of_attention = special if values.INFINITE_ATTENTION or special != "infinite" else "nan"

    return {
        "features": features,
        "weight": values.placed(r, values.numbers(r, (k, width), kind, "")),
        "bias": parameter((n, k), of_attention) if chance(r, 0.7) else None,
        "attention_weight": None if mode == "folded" else parameter(weight_shape, of_attention),
        "attention_bias": parameter(bias_shape, of_attention) if has_bias and bias_shape is not None else None,
        "attention": mode,
        "pool_size": pool,
    }


def break_features(r: Random, features: list[Any]) -> Any:
    """Features that do not fit: too many, none, no list, or one that is wrong."""
    way = r.choice(("one", "one", "one", "one", "too many", "none", "no list", "fewer"))
    if way == "one" and features:
        i = r.randrange(len(features))
        return [values.wrong_tensor(r, x) if j == i else x for j, x in enumerate(features)]
    if way == "too many":
        return features * (17 // max(1, len(features)) + 1)
    if way == "no list":
        return r.choice((None, 3, features[0] if features else 1, {"a": 1}, "x"))
    return features[:-1] if way == "fewer" else []


def without_endless(features: Any) -> Any:
    """For NHWC, where 2^40 channels are 2^40 rows: they would be pooled, which is right and takes for ever."""
    if not isinstance(features, list):
        return features
    return [None if isinstance(x, Tensor) and not x.is_nested and x.numel() > 2**30 else x for x in features]


def _broken(r: Random, arguments: dict[str, Any], wrong: dict[str, Callable[[], Any]]) -> tuple[str, ...]:
    """Replaces one or two arguments in half of all calls; their names."""
    if chance(r, 0.5):
        return ()
    names = r.sample(sorted(wrong), 1 if chance(r, 0.8) else 2)
    for name in names:
        arguments[name] = wrong[name]()
    return tuple(names)


def _wrong_head(r: Random, a: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    wrong: dict[str, Callable[[], Any]] = {
        name: (lambda name=name: values.wrong_tensor(r, a[name])) for name in ("weight", "bias", "attention_weight", "attention_bias")
    }
    return wrong | {
        "features": lambda: break_features(r, a["features"]),
        "attention": lambda: values.wrong_name(r),
        "pool_size": lambda: values.wrong_size(r),
    }


def _leaf(r: Random, t: Any, probability: float = 0.6) -> Any:
    """t as a leaf that wants a gradient, mostly."""
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.is_nested or t.layout != torch.strided or not chance(r, probability):
        return t
    return t.detach().requires_grad_()


def _upstream(r: Random, out: Any) -> Tensor | None:
    return values.numbers(r, tuple(out.shape), out.dtype) if isinstance(out, Tensor) and out.device.type == "cpu" and chance(r, 0.8) else None


def differentiated(r: Random, outputs: dict[str, Any], leaves: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Gradients by name of what wants one, and the upstream gradients used."""
    pairs = {name: (out, _upstream(r, out)) for name, out in outputs.items() if isinstance(out, Tensor) and out.requires_grad}
    pairs = {name: (out, g) for name, (out, g) in pairs.items() if g is not None}
    wanted = {name: t for name, t in leaves.items() if isinstance(t, Tensor) and t.requires_grad}
    if not pairs or not wanted:
        return {}, {}
    grads = torch.autograd.grad([o for o, _ in pairs.values()], list(wanted.values()), [g for _, g in pairs.values()], allow_unused=True)
    return dict(zip(wanted, grads, strict=True)), {name: g for name, (_, g) in pairs.items()}


def _nchw(features: list[Tensor], layout: Any) -> list[Tensor]:
    each = [layout] * len(features) if isinstance(layout, str) else list(layout)
    moved = []
    for x, order in zip(features, each, strict=True):
        if order == "NHWC" and x.dim() == 4:
            x = x.permute(0, 3, 1, 2)
        elif order == "NHWC" and x.dim() == 3:
            x = x.transpose(1, 2)[..., None]
        moved.append(x)
    return moved


# --- public functions -------------------------------------------------------------------------------------------------------
def draw_interflow_head(r: Random) -> Call:
    a = head_arguments(r)
    n = len(a["features"])
    a |= {"layout": "NCHW", "return_branches": chance(r, 0.5)}
    if chance(r, 0.25):  # NHWC, and tokens where nothing is binned
        a["layout"] = "NHWC" if chance(r, 0.5) else tuple("NHWC" for _ in range(n))
        a["features"] = [x.permute(0, 2, 3, 1) if x.dim() == 4 else x for x in a["features"]]
        if a["pool_size"] == (1, 1) and chance(r, 0.3):
            a["features"] = [x.flatten(1, 2) if x.dim() == 4 else x for x in a["features"]]
    if a["weight"].dtype in (torch.bfloat16, torch.float16) and chance(r, 0.3):
        a["features"] = [x.float() if x.dim() == 2 else x for x in a["features"]]
    wrong = _wrong_head(r, a) | {"layout": lambda: values.wrong_layout(r, n), "return_branches": lambda: values.wrong_flag(r)}
    broken = _broken(r, a, wrong)
    if not (isinstance(a["layout"], str) and a["layout"] == "NCHW"):
        a["features"] = without_endless(a["features"])
    a |= {name: _leaf(r, a[name]) for name in ("weight", "bias", "attention_weight", "attention_bias")}
    if isinstance(a["features"], list):
        a["features"] = [_leaf(r, x) for x in a["features"]]
    way = r.choices(("plain", "inference", "autocast", "eager"), (8, 1, 1, 1))[0]
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        with ExitStack() as stack:
            if way == "inference":
                stack.enter_context(torch.inference_mode())
            elif way == "autocast":
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            elif way == "eager":
                stack.enter_context(backend("eager"))
            out = interflow_head(**a)
        results = {"y": out[0], "branches": out[1]} if isinstance(out, tuple) else {"y": out}
        leaves = {f"features[{i}]": x for i, x in enumerate(a["features"])} | {name: a[name] for name in _PARAMETERS}
        grads, up = differentiated(r, results, leaves)
        used.update(up)
        return {} if way == "eager" else {**results, **{name: _as_feature(name, g, a) for name, g in grads.items()}}

    def expect() -> Expected:
        features = _nchw(a["features"], a["layout"])
        return oracle.head(features, *(a[name] for name in _PARAMETERS), a["attention"], a["pool_size"], used.get("y"), used.get("branches"))

    return Call({**a, "way": way}, run, expect, broken)


_PARAMETERS = ("weight", "bias", "attention_weight", "attention_bias")


def _as_feature(name: str, gradient: Tensor | None, a: dict[str, Any]) -> Tensor | None:
    """A feature's gradient in the order that the definition has."""
    if gradient is None or not name.startswith("features["):
        return gradient
    i = int(name[9:-1])
    layout = a["layout"] if isinstance(a["layout"], str) else a["layout"][i]
    return _nchw([gradient], layout)[0]


def _tap_arguments(r: Random) -> tuple[Tensor, Tensor | None]:
    kind, special = values.dtype(r), r.choices(("", "nan", "infinite"), (5, 1, 1))[0]
    shape = (values.size(r, 4), values.size(r, r.choice((4, 40))), max(1, values.size(r, 14)), max(1, values.size(r, 14)))
    ties = (values.numbers(r, shape, torch.float32, special) * 4).round() / 4
    u = values.placed(r, ties.to(kind))
    shift = values.placed(r, values.numbers(r, (shape[1],), kind if chance(r, 0.5) else torch.float32, special)) if chance(r, 0.7) else None
    return u, shift


def draw_stage_tap(r: Random) -> Call:
    u, shift = _tap_arguments(r)
    a: dict[str, Any] = {"u": u, "shift": shift, "max_pool": chance(r, 0.5)}
    wrong = {"u": lambda: values.wrong_tensor(r, u), "shift": lambda: values.wrong_tensor(r, shift), "max_pool": lambda: values.wrong_flag(r)}
    broken = _broken(r, a, wrong)
    a |= {"u": _leaf(r, a["u"]), "shift": _leaf(r, a["shift"])}
    way = r.choices(("plain", "inference", "eager"), (8, 1, 1))[0]
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        with ExitStack() as stack:
            if way == "inference":
                stack.enter_context(torch.inference_mode())
            elif way == "eager":
                stack.enter_context(backend("eager"))
            m, p = stage_tap(**a)
        results = {"m": m, "p": p}
        grads, up = differentiated(r, results, {"du": a["u"], "dshift": a["shift"]})
        used.update(up)
        return {} if way == "eager" else {**results, **grads}

    return Call({**a, "way": way}, run, lambda: oracle.tap(a["u"], a["shift"], bool(a["max_pool"]), used.get("m"), used.get("p")), broken)


# --- raw operators ----------------------------------------------------------------------------------------------------------
def _flags(r: Random, a: dict[str, Any], names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    a |= {name: chance(r, 0.7) for name in names}
    return {name: (lambda: values.wrong_flag(r)) for name in names}


def draw_raw_interflow_head(r: Random) -> Call:
    a = head_arguments(r, (*ATTENTIONS, "folded"))
    a["pool_size"] = list(a["pool_size"])
    wrong = _wrong_head(r, a) | _flags(r, a, ("need_branches",))
    double = a["weight"].dtype == torch.float64
    a["dtype"] = r.choice((None, None, torch.float32, torch.bfloat16, torch.float16, torch.float64))
    if not double and chance(r, 0.3):  # features of any dtype below fp64, parameters of any
        a["features"] = [x.to(r.choice((torch.float32, torch.bfloat16, torch.float16))) for x in a["features"]]
        a["bias"] = None if a["bias"] is None else a["bias"].to(r.choice(values.FLOATS))
    wrong["dtype"] = lambda: r.choice((*values.OTHER_DTYPES, torch.quint8, torch.complex32, "float32", 3, 6))
    broken = _broken(r, a, wrong)
    a |= {name: _leaf(r, a[name], 0.3) for name in _PARAMETERS}
    if isinstance(a["features"], list):
        a["features"] = [_leaf(r, x, 0.3) for x in a["features"]]
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        y, branches, _pooled = raw.interflow_head(**a)
        results = {"y": y} | ({"branches": branches} if a["need_branches"] else {})
        leaves = {f"features[{i}]": x for i, x in enumerate(a["features"])} | {name: a[name] for name in _PARAMETERS}
        grads, up = differentiated(r, results, leaves)
        used.update(up)
        return {**results, **grads}

    def expect() -> Expected:
        return oracle.head(a["features"], *(a[name] for name in _PARAMETERS), a["attention"], a["pool_size"], used.get("y"), used.get("branches"))

    return Call(a, run, expect, broken)


def draw_raw_interflow_head_backward(r: Random) -> Call:
    h = head_arguments(r, (*ATTENTIONS, "folded"))
    weight, bins = h["weight"], h["pool_size"][0] * h["pool_size"][1]
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    widths = [x.shape[1] * (bins if x.dim() == 4 else 1) for x in h["features"]]
    batch, n, k = h["features"][0].shape[0], len(widths), weight.shape[0]

    def drawn(*shape: int, kind: torch.dtype = weight.dtype, mode: str = h["attention"]) -> Tensor:
        return values.placed(r, values.numbers(r, shape, kind, _special(r, mode)))

    a: dict[str, Any] = {
        "dy": drawn(batch, k, mode="nxn") if chance(r, 0.8) else None,
        "dbranches": drawn(batch, n, k) if chance(r, 0.5) else None,
        "pooled": drawn(batch, sum(widths), kind=wide),
        **{name: h[name] for name in (*_PARAMETERS, "attention")},
        "widths": widths,
        "feature_stages": sorted(r.sample(range(n), r.randint(0, n))),
    }
    wrong = _flags(r, a, ("need_weight", "need_bias", "need_attention"))
    for name in ("dy", "dbranches", "pooled", *_PARAMETERS):
        wrong[name] = lambda name=name: values.wrong_tensor(r, a[name])  # type: ignore[misc]
    wrong["attention"] = lambda: values.wrong_name(r)
    wrong["widths"] = lambda: r.choice(
        ([], widths[:-1], [*widths, 1], [w + 1 for w in widths], [-1, sum(widths) + 1], [2**62] * 3, widths * 17, None, 3, [1.5])
    )
    wrong["feature_stages"] = lambda: r.choice(([n], [-1], [0, 0], [2**62], [0] * 20, None, 1.5, ["0"]))
    broken = _broken(r, a, wrong)

    def run() -> dict[str, Tensor | None]:
        dpooled, dweight, dbias, daw, dab = raw.interflow_head_backward(**a)
        results: dict[str, Tensor | None] = {}
        if a["feature_stages"] and not dpooled.is_meta:
            for i, part in enumerate(dpooled.split(a["widths"], 1)):
                if i in a["feature_stages"]:
                    results[f"features[{i}]"] = part
                elif part.count_nonzero():
                    raise AssertionError(f"dpooled of stage {i}, which is not in feature_stages, is not zero")
        for name, gradient, needed in (
            ("weight", dweight, "weight"),
            ("bias", dbias, "bias"),
            ("attention_weight", daw, "attention"),
            ("attention_bias", dab, "attention"),
        ):
            if a[f"need_{needed}"] and a[name] is not None:
                results[name] = gradient
        return results

    def expect() -> Expected:
        pooled = a["pooled"]
        if min(a["widths"]) < 0 or tuple(pooled.shape) != (pooled.shape[0], sum(a["widths"])):
            raise ValueError("the definition does not take this")
        features = list(pooled.split(a["widths"], 1))
        return oracle.head(features, *(a[name] for name in _PARAMETERS), a["attention"], (1, 1), a["dy"], a["dbranches"])

    return Call(a, run, expect, broken)


def draw_raw_stage_tap(r: Random) -> Call:
    u, shift = _tap_arguments(r)
    a: dict[str, Any] = {"u": u, "shift": shift}
    wrong = _flags(r, a, ("max_pool", "need_mask")) | {"u": lambda: values.wrong_tensor(r, u), "shift": lambda: values.wrong_tensor(r, shift)}
    broken = _broken(r, a, wrong)
    if a["need_mask"] is True:
        a |= {"u": _leaf(r, a["u"], 0.4), "shift": _leaf(r, a["shift"], 0.4)}
    used: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        m, p, _mask = raw.stage_tap(**a)
        results = {"p": p} | ({"m": m} if a["max_pool"] else {})
        grads, up = differentiated(r, results, {"du": a["u"], "dshift": a["shift"]})
        used.update(up)
        return {**results, **grads}

    return Call(a, run, lambda: oracle.tap(a["u"], a["shift"], bool(a["max_pool"]), used.get("m"), used.get("p")), broken)


def draw_raw_stage_tap_backward(r: Random) -> Call:
    u, shift = _tap_arguments(r)
    max_pool = chance(r, 0.5)
    m, p, mask = raw.stage_tap(u, shift, max_pool, True)
    a: dict[str, Any] = {
        "dm": values.placed(r, values.numbers(r, tuple(m.shape), u.dtype)) if max_pool and chance(r, 0.7) else None,
        "dp": values.placed(r, values.numbers(r, tuple(p.shape), p.dtype)) if chance(r, 0.7) else None,
        "mask": mask,
        "like": torch.empty((), dtype=u.dtype).expand(u.shape),
        "max_pool": max_pool,
        "channels_last": is_channels_last(u),
        "need_shift": chance(r, 0.7),
    }
    strewn = chance(r, 0.1)
    if strewn:  # a mask that no forward pass wrote: any result, but one that stays inside its tensors
        a["mask"] = torch.randint(0, 256, mask.shape, dtype=torch.uint8)
    wrong: dict[str, Callable[[], Any]] = {name: (lambda name=name: values.wrong_tensor(r, a[name])) for name in ("dm", "dp", "mask", "like")}
    wrong |= {name: (lambda: values.wrong_flag(r)) for name in ("max_pool", "channels_last", "need_shift")}
    broken = _broken(r, a, wrong)

    def run() -> dict[str, Tensor | None]:
        du, dshift = raw.stage_tap_backward(**a)
        if strewn or not {"mask", "like", "max_pool", "channels_last"}.isdisjoint(broken):  # nothing says what the mask means then
            return {}
        return {"du": du} | ({"dshift": dshift} if a["need_shift"] else {})

    def expect() -> Expected:
        expected = oracle.tap(u, shift, max_pool, a["dm"], a["dp"])
        if a["dm"] is None and a["dp"] is None:
            expected.values |= {"du": torch.zeros(u.shape, dtype=torch.float64), "dshift": torch.zeros(u.shape[1], dtype=torch.float64)}
        return expected

    return Call(a, run, expect, broken)
