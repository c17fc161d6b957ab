"""A drawer of calls for the modules: constructors with right and wrong arguments, then forward, folding and swapping."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from interflow_kernels import AuxiliaryHeads, FoldedInterflowHead, FusedInterflowHead, InterflowHead, StageTap, backend
from interflow_kernels.reference import ATTENTIONS

from . import oracle, values
from .oracle import Call, Expected
from .targets import break_features, differentiated, without_endless
from .values import Random, chance


def _constructor(r: Random) -> tuple[dict[str, Any], dict[str, Callable[[], Any]]]:
    """Arguments of a head that fit, and how to break each."""
    n, mode = r.choices((1, 2, 3, 16), (3, 3, 3, 1))[0], r.choice(ATTENTIONS)
    a: dict[str, Any] = {
        "in_channels": tuple(r.randint(1, 12) for _ in range(n)),
        "num_classes": r.choice((1, 2, 10)),
        "attention": mode,
        "pool_size": r.choice((1, 1, (1, 2), (2, 2))),
        "layout": r.choice(("NCHW", "NCHW", "NHWC", ["NHWC"] * n)),
        "bias": chance(r, 0.7),
        "attention_bias": mode != "hard" and chance(r, 0.5),
        "hard_weights": [r.uniform(-1, 1) for _ in range(n)] if mode == "hard" and chance(r, 0.5) else None,
        "device": r.choice((None, "cpu", torch.device("cpu"))),
        "dtype": r.choice((None, *values.FLOATS)),
    }
    wrong: dict[str, Callable[[], Any]] = {
        "in_channels": lambda: r.choice(
            (values.wrong_size(r), [values.wrong_size(r)] * n, (1,) * 17, range(1, n + 1), list(a["in_channels"]), "12", torch.ones(n), iter([1]))
        ),
        "num_classes": lambda: values.wrong_size(r),
        "attention": lambda: values.wrong_name(r),
        "pool_size": lambda: values.wrong_size(r),
        "layout": lambda: values.wrong_layout(r, n),
        "bias": lambda: values.wrong_flag(r),
        "attention_bias": lambda: values.wrong_flag(r),
        "hard_weights": lambda: r.choice(
            (
                1.0,
                "x",
                [1.0] * (n + 1),
                [float("nan")] * n,
                [None] * n,
                torch.ones(n),
                torch.ones(n, n),
                torch.ones(n).to_sparse(),
                torch.ones(n, device="meta"),
                {},
            )
        ),
        "device": lambda: r.choice((1.5, "nowhere", "meta", [], object(), "cpu:x")),
        "dtype": lambda: r.choice((torch.int32, torch.float8_e4m3fn, torch.complex64, "float32", 3, float)),
    }
    return a, wrong


def _broken(r: Random, a: dict[str, Any], wrong: dict[str, Callable[[], Any]]) -> tuple[str, ...]:
    if chance(r, 0.6):
        return ()
    name = r.choice(sorted(wrong))
    a[name] = wrong[name]()
    return (name,)


def _maps(r: Random, head: Any) -> list[Tensor]:
    """Maps that fit a head; NHWC where it asks for that."""
    batch, kind = values.size(r, 4), torch.float32 if head.fold is None else head.weight.dtype
    maps = []
    for channels, order in zip(head.in_channels, head.layout, strict=True):
        x = values.placed(r, values.numbers(r, (batch, channels, r.randint(1, 7), r.randint(1, 7)), kind))
        maps.append(x.permute(0, 2, 3, 1) if order == "NHWC" else x)
    return maps


def _dressed(r: Random, head: nn.Module) -> str:
    """Now and then a weight that is computed from others."""
    way = r.choice(("plain",) * 6 + ("parametrized weight norm", "spectral norm", "weight norm", "old spectral norm", "pruned"))
    if way == "plain" or head.weight.dtype in (torch.bfloat16, torch.float16) or head.weight.is_meta:
        return "plain"
    dress = {
        "parametrized weight norm": parametrizations.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "weight norm": weight_norm,
        "old spectral norm": spectral_norm,
        "pruned": lambda h: prune.random_unstructured(h, "weight", 0.5),
    }[way]
    dress(head)
    return way


def draw_head_modules(r: Random) -> Call:
    """InterflowHead and FusedInterflowHead: construction, forward and backward, fold, to_eager, from_eager, stage_weights."""
    a, wrong = _constructor(r)
    broken = _broken(r, a, wrong)
    kind, steps = r.choice((FusedInterflowHead, FusedInterflowHead, InterflowHead)), Random(r.getrandbits(60))
    spoil = chance(r, 0.2)
    kept: dict[str, Any] = {}

    def run() -> dict[str, Tensor | None]:
        torch.manual_seed(steps.getrandbits(30))
        head = kind(**a)
        repr(head)
        if head.weight.is_meta:
            return {}
        _dressed(steps, head)
        head.train(chance(steps, 0.5))
        maps = _maps(steps, head)
        if spoil:
            head(without_endless(break_features(steps, maps)))
            return {}
        leaves = {f"features[{i}]": x.detach().requires_grad_() for i, x in enumerate(maps)}
        y, branches = head.forward_branches(list(leaves.values()))
        grads, up = differentiated(steps, {"y": y, "branches": branches}, leaves)
        moved = {name: g if g is None or head.layout[i] == "NCHW" else g.permute(0, 3, 1, 2) for i, (name, g) in enumerate(grads.items())}
        head.eval()
        nchw = [x.permute(0, 3, 1, 2) if order == "NHWC" else x for x, order in zip(maps, head.layout, strict=True)]
        if type(head).__name__.endswith("FusedInterflowHead") and chance(steps, 0.5):
            again = FusedInterflowHead.from_eager(head.to_eager())
            kept.update(swapped=again(maps))
        now, _ = head.forward_branches(maps)
        kept.update(head=head, nchw=nchw, parameters=[None if t is None else t.detach() for t in head._read()], up=up, now=now)
        if head.attention != "gated":
            kept.update(folded=head.fold()(maps))
        head.stage_weights(maps)
        low = kind is InterflowHead and head.weight.dtype in (torch.bfloat16, torch.float16)  # PyTorch's own roundings
        return {} if low else {"now": now, **({} if _trained(head) else {"y": y, "branches": branches, **moved})}

    def expect() -> Expected:
        head = kept["head"]
        expected = oracle.head(kept["nchw"], *kept["parameters"], head.attention, head.pool_size, kept["up"].get("y"), kept["up"].get("branches"))
        expected.values["now"], expected.magnitudes["now"] = expected.values["y"], expected.magnitudes["y"]
        if "swapped" in kept and not torch.equal(kept["swapped"].nan_to_num(), kept["now"].nan_to_num()):
            raise AssertionError("to_eager and from_eager changed the head")
        if "folded" in kept:
            rounding = 2**-5 if kept["now"].dtype in (torch.bfloat16, torch.float16) else 1e-5
            worst = (kept["folded"].double() - expected.values["y"]).abs() > rounding * (expected.magnitudes["y"] + 1)
            if worst.any():
                raise AssertionError("the folded head differs")
        return expected

    return Call({**a, "kind": kind.__name__}, run, expect, (*broken, *(("features",) if spoil else ())))


def _trained(head: nn.Module) -> bool:
    """Whether a forward pass in training changes the weight (a power iteration)."""
    return any("spectral" in type(m).__name__.lower() or m.__class__.__name__ == "_SpectralNorm" for m in head.modules()) or bool(head._forward_pre_hooks)


def draw_other_modules(r: Random) -> Call:
    """AuxiliaryHeads, FoldedInterflowHead, StageTap and backend()."""
    return r.choice((_auxiliary, _folded, _tap, _backend))(r)


def _auxiliary(r: Random) -> Call:
    head, breaks = _constructor(r)
    names = ("in_channels", "num_classes", "layout", "device", "dtype")
    a: dict[str, Any] = {**{name: head[name] for name in names}, "weight": r.choice((0.3, 0, 1))}
    wrong = {name: breaks[name] for name in names} | {"weight": lambda: r.choice((-1, float("nan"), "x", None, True, [1.0], torch.tensor(0.3), float("inf")))}
    broken = _broken(r, a, wrong)
    spoil, steps = r.choice(("", "", "features", "branches", "target")), Random(r.getrandbits(60))
    kept: dict[str, Tensor] = {}

    def run() -> dict[str, Tensor | None]:
        heads = AuxiliaryHeads(**a)
        weight = heads.classifiers[0].weight
        if weight.is_meta:
            return {}
        maps = []
        for c, order in zip(heads.in_channels, heads.layout, strict=True):
            x = values.numbers(steps, (3, c, 4, 5), weight.dtype)
            maps.append(x.permute(0, 2, 3, 1) if order == "NHWC" else x)
        branches = heads(without_endless(break_features(steps, maps)) if spoil == "features" else maps)
        target: Any = torch.randint(0, heads.num_classes, (3,))
        given = values.wrong_tensor(steps, branches) if spoil == "branches" else branches
        target = values.wrong_tensor(steps, target) if spoil == "target" else target
        loss = heads.loss(given, target)
        if spoil or weight.dtype in (torch.bfloat16, torch.float16):
            return {}
        scores = [
            F.linear((x.mean((1, 2)) if o == "NHWC" else x.mean((2, 3))), c.weight, c.bias)
            for x, o, c in zip(maps, heads.layout, heads.classifiers, strict=True)
        ]
        losses = [F.cross_entropy(z.double(), target) for z in scores]
        kept["loss"] = losses[-1] + heads.loss_weight * sum(losses[:-1], torch.zeros(()))
        return {"loss": loss.detach()}

    def expect() -> Expected:
        return Expected({name: t.detach() for name, t in kept.items()}, {name: t.detach() + 10 for name, t in kept.items()})

    return Call({**a, "spoil": spoil}, run, expect, (*broken, *((spoil,) if spoil else ())))


def _folded(r: Random) -> Call:
    n, k, kind = r.randint(1, 3), r.randint(1, 5), values.dtype(r)
    channels = tuple(r.randint(1, 6) for _ in range(n))
    a: dict[str, Any] = {
        "in_channels": channels,
        "weight": values.numbers(r, (k, sum(channels)), kind),
        "bias": values.numbers(r, (k,), kind),
        "pool_size": 1,
        "layout": "NCHW",
        "fused": chance(r, 0.7),
    }
    wrong: dict[str, Callable[[], Any]] = {name: (lambda name=name: values.wrong_tensor(r, a[name])) for name in ("weight", "bias")}
    wrong |= {
        "in_channels": lambda: values.wrong_size(r),
        "pool_size": lambda: values.wrong_size(r),
        "layout": lambda: values.wrong_layout(r, n),
        "fused": lambda: values.wrong_flag(r),
    }
    broken = _broken(r, a, wrong)
    spoil, steps = chance(r, 0.2), Random(r.getrandbits(60))
    kept: dict[str, Any] = {}

    def run() -> dict[str, Tensor | None]:
        head = FoldedInterflowHead(**a)
        maps = [values.placed(steps, values.numbers(steps, (2, c, 3, 4), kind)) for c in channels]
        maps = [x.permute(0, 2, 3, 1) if order == "NHWC" else x for x, order in zip(maps, head.layout, strict=True)]
        y = head(without_endless(break_features(steps, maps)) if spoil else maps)
        if spoil or not head.fused:
            return {}
        kept["nchw"] = [x.permute(0, 3, 1, 2) if order == "NHWC" else x for x, order in zip(maps, head.layout, strict=True)]
        return {"y": y}

    def expect() -> Expected:
        return oracle.head(kept["nchw"], a["weight"], None, None, a["bias"], "folded", a["pool_size"]) if kept else Expected({})

    return Call({**a, "spoil": spoil}, run, expect, (*broken, *(("features",) if spoil else ())))


def _tap(r: Random) -> Call:
    a: dict[str, Any] = {"max_pool": chance(r, 0.5)}
    broken = _broken(r, a, {"max_pool": lambda: values.wrong_flag(r)})
    kind = values.dtype(r)
    x = values.placed(r, values.numbers(r, (2, 3, r.randint(1, 9), r.randint(1, 9)), kind))
    spoil, steps = chance(r, 0.2), Random(r.getrandbits(60))
    kept: dict[str, Any] = {}

    def run() -> dict[str, Tensor | None]:
        tap, conv = StageTap(**a), nn.Conv2d(3, 4, 3, padding=1, dtype=kind)
        u, shift = F.conv2d(x, conv.weight, None, padding=1).detach(), conv.bias.detach()
        kept.update(u=u, shift=shift)
        m, p = tap(values.wrong_tensor(steps, u) if spoil else u, shift)
        return {} if spoil else {"m": m, "p": p}

    return Call({**a, "spoil": spoil}, run, lambda: oracle.tap(kept["u"], kept["shift"], bool(a["max_pool"])), (*broken, *(("u",) if spoil else ())))


def _backend(r: Random) -> Call:
    a = {"name": r.choice(("auto", "native", "eager", "triton"))}
    broken = _broken(r, a, {"name": lambda: values.wrong_name(r)})

    def run() -> dict[str, Tensor | None]:
        with backend(**a):
            FusedInterflowHead((2,), 3)([torch.ones(1, 2, 3, 3)])
        return {}

    return Call(a, run, lambda: Expected({}), (*broken, "name"))
