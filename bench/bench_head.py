"""The head on the CPU against eager PyTorch, torch.compile and the read limit: VGG-16's four stages at 224 pixels, K = 1000."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Case, record, refuse_wrong
from roofline import HeadShape

from interflow_kernels import FusedInterflowHead

MAPS = ((128, 112, 112), (256, 56, 56), (512, 28, 28), (512, 14, 14))
CLASSES = 1000
CACHE_BYTES = 96 << 20  # rotating inputs together exceed any last-level cache here
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def inputs(batch: int, dtype: torch.dtype, layout: str, sets: int) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(batch, *m, generator=generator).to(dtype).contiguous(memory_format=FORMATS[layout]) for m in MAPS] for _ in range(sets)]


def heads(dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(0)
    ours = FusedInterflowHead([c for c, _, _ in MAPS], CLASSES, "nxn").to(dtype)
    eager = ours.to_eager()
    return {"ours": ours, "eager": eager, "compiled": torch.compile(eager)}


# --- forward ----------------------------------------------------------------------------------------------------------
FORWARD = {
    # name: dtype, layout, batch, input sets in turn (None: more than the cache holds), targets of the design
    "forward fp32 nchw B=1": (torch.float32, "nchw", 1, None, {"peer": 2.5}),
    "forward fp32 nchw B=1 warm": (torch.float32, "nchw", 1, 1, {}),
    "forward fp32 nchw B=8": (torch.float32, "nchw", 8, None, {}),
    "forward fp32 nchw B=32": (torch.float32, "nchw", 32, None, {"peer": 1.0, "read": 0.85}),
    "forward fp32 channels_last B=8": (torch.float32, "channels_last", 8, None, {"peer": 1.8}),
    "forward fp32 channels_last B=32": (torch.float32, "channels_last", 32, None, {"peer": 1.8}),
    "forward bf16 nchw B=8": (torch.bfloat16, "nchw", 8, None, {"peer": 2.0}),
    "forward bf16 channels_last B=8": (torch.bfloat16, "channels_last", 8, None, {"peer": 4.0}),
}


@cache
def forward_case(name: str) -> Case:
    dtype, layout, batch, sets, target = FORWARD[name]
    shape = HeadShape(MAPS, CLASSES, batch, dtype.itemsize)
    given = inputs(batch, dtype, layout, sets or -(-CACHE_BYTES // shape.map_bytes()))
    modules = heads(dtype)

    def check() -> None:
        with torch.inference_mode():
            exact = modules["eager"].double()([x.double() for x in given[0]])
            modules["eager"].to(dtype)
            for provider, module in modules.items():
                limit = 1e-5 if dtype == torch.float32 else 3e-2
                refuse_wrong(f"{name}: {provider}", module(given[0]), exact, limit)

    def run(module: Any) -> Any:
        def call(i: int) -> None:
            with torch.inference_mode():
                module(given[i])

        return call

    providers = {provider: run(module) for provider, module in modules.items()}
    # The limit: the same bytes summed as fp32 (PyTorch's 16-bit sum is bound by arithmetic, not by memory).
    words = [[x.as_strided((x.numel(),), (1,)).view(torch.float32) for x in maps] for maps in given]
    providers["read"] = lambda i: [x.sum() for x in words[i]]
    return Case(name, providers, len(given), shape.forward_bytes(), target, check)


@pytest.mark.parametrize("provider", ["ours", "eager", "compiled", "read"])
@pytest.mark.parametrize("name", FORWARD)
def test_forward(benchmark: Any, name: str, provider: str) -> None:
    record(benchmark, forward_case(name), provider)
    if provider == "read":  # the case is done: its inputs need not stay
        forward_case.cache_clear()


# --- what the head adds to a training step whose maps a max-pool also consumes ---------------------------------------------
@cache
def added_case(layout: str) -> Case:
    given = inputs(8, torch.float32, layout, 1)[0]
    modules = heads(torch.float32)
    leaves = [x.requires_grad_() for x in given]
    modules["none"] = None
    down = [torch.ones_like(F.max_pool2d(x, 2, 2)) for x in given]

    def step(head: Any) -> None:
        maps = [F.relu(x) for x in leaves]  # produced by a ReLU, as in a network: gradients meet behind it
        pooled = [F.max_pool2d(x, 2, 2) for x in maps]
        outputs, gradients = list(pooled), list(down)
        if head is not None:
            outputs.append(head(maps).sum())
            gradients.append(torch.ones(()))
        torch.autograd.grad(outputs, leaves, gradients)

    def check() -> None:
        expected = modules["eager"]([x.detach() for x in given])
        refuse_wrong("ours", modules["ours"]([x.detach() for x in given]), expected, 1e-5)

    providers = {name: (lambda i, head=head: step(head)) for name, head in modules.items() if name != "compiled"}
    shape = HeadShape(MAPS, CLASSES, 8, 4)
    return Case(f"added by the head, forward+backward fp32 {layout} B=8", providers, 1, shape.map_bytes(), {}, check, seconds=25)


@pytest.mark.parametrize("provider", ["ours", "eager", "none"])
@pytest.mark.parametrize("layout", FORMATS)
def test_added(benchmark: Any, layout: str, provider: str) -> None:
    case = added_case(layout)
    record(benchmark, case, provider)
    ours, eager, none = (sorted(case.samples[n])[len(case.samples[n]) // 2] for n in ("ours", "eager", "none"))
    benchmark.extra_info["added_ms"] = {"ours": round((ours - none) * 1e3, 2), "eager": round((eager - none) * 1e3, 2)}
    benchmark.extra_info["added_ratio"] = round((eager - none) / max(ours - none, 1e-9), 2)
    benchmark.extra_info["target"] = {"added_ratio": 4.0 if layout == "channels_last" else 1.0}
    if provider == "none":
        added_case.cache_clear()


# --- host time ------------------------------------------------------------------------------------------------------------
@cache
def host_case() -> Case:
    maps = [torch.randn(1, 4, 2, 2) for _ in range(4)]
    head = FusedInterflowHead((4,) * 4, 4)
    eager = head.to_eager()
    raw = torch.ops.interflow_kernels.interflow_head.default
    arguments = (maps, head.weight, head.bias, head.attention_weight, None, "nxn", (1, 1), False, None)

    def repeated(f: Any) -> Any:
        def call(_: int) -> None:
            with torch.inference_mode():
                for _ in range(100):
                    f()

        return call

    providers = {
        "raw operator": repeated(lambda: raw(*arguments)),
        "head(xs)": repeated(lambda: head(maps)),
        "eager head(xs)": repeated(lambda: eager(maps)),
        "torch.empty": repeated(lambda: torch.empty(4, 4)),
    }
    return Case("host time of 100 calls, tiny inputs, inference_mode", providers, 1, target={"raw_us": 9.0, "head_us": 16.0}, seconds=6)


@pytest.mark.parametrize("provider", ["raw operator", "head(xs)", "eager head(xs)", "torch.empty"])
def test_host_time(benchmark: Any, provider: str) -> None:
    info = record(benchmark, host_case(), provider)
    benchmark.extra_info["us_per_call"] = round(info["p50_us"] / 100, 2)
