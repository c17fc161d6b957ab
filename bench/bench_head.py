"""The head by itself: forward, forward and backward, what it adds to a stage, folded beside inference engines, host time."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import goals, peers
from harness.case import Case, Kind, Plan, Provider, Unavailable, distinct
from harness.gate import TOLERANCE
from harness.inputs import DTYPES, cold_sets, feature_maps
from harness.memory import saved_bytes
from harness.roofline import HEAD_STAGES, HeadShape, at_pixels
from harness.run import Session, device_limits, limit_read
from harness.twin import triton
from torch import Tensor

from interflow_kernels import FusedInterflowHead, InterflowHead

CHANNELS = [c for c, _, _ in HEAD_STAGES]
TARGETS = {  # (dtype, layout, batch): of the forward pass
    ("fp32", "nchw", 1): [goals.faster_than_peers(2.5)],
    ("fp32", "nchw", 32): [goals.faster_than_peers(1.0), goals.share_of("read", 0.85)],
    ("fp32", "channels_last", 8): [goals.faster_than_peers(1.8)],
    ("fp32", "channels_last", 32): [goals.faster_than_peers(1.8)],
    ("bf16", "nchw", 8): [goals.faster_than_peers(2.0)],
    ("bf16", "channels_last", 8): [goals.faster_than_peers(4.0)],
}
PLAIN = ("ours", "eager", "compiled")
QUICK = [("fp32", layout, b) for layout in ("nchw", "channels_last") for b in (1, 8, 32)] + [("bf16", layout, 8) for layout in ("nchw", "channels_last")]
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GPU_MODES = (*PLAIN, "TensorRT")
GPU_CASES = [(224, 1000, b) for b in (1, 8, 32, 128, 256)] + [(32, 10, b) for b in (128, 512, 2048)]  # pixels, K, B


def plans(full: bool, device: torch.device) -> Iterator[Plan]:
    if device.type != "cuda":
        yield from cpu_plans(full, device)
    else:
        yield from distinct([*gpu_plans(device), *(cpu_plans(True, device) if full else [])])


def gpu_plans(device: torch.device) -> Iterator[Plan]:
    """bf16 in replayed graphs, whose goals goals.GPU_HEAD has; what eager calls cost; what a call costs the host."""
    for pixels, classes, batch in GPU_CASES:
        for layout in ("nchw", "channels_last"):
            yield plan("forward", device, GPU_MODES, "bf16", layout, batch, pixels=pixels, classes=classes, seconds=0.8)
    for layout in ("nchw", "channels_last"):
        yield plan("forward+backward", device, PLAIN, "bf16", layout, 32, seconds=1)
        for batch in (1, 32):
            yield plan("forward", device, PLAIN, "bf16", layout, batch, calls=True, seconds=0.5)
    yield Plan("head, host time of a call, tiny inputs", HOST, partial(host, device), 1)


def cpu_plans(full: bool, device: torch.device) -> Iterator[Plan]:
    """What a CPU's targets are set on; with `full` everything, on any device."""
    modes = (*PLAIN, "max-autotune") if full else PLAIN
    cases = [(d, layout, b) for d in DTYPES for layout in ("nchw", "channels_last") for b in BATCHES] if full else QUICK
    for dtype, layout, batch in cases:
        yield plan("forward", device, modes, dtype, layout, batch)
    yield plan("forward", device, modes, "fp32", "nchw", 1, warm=True)
    for layout in ("nchw", "channels_last"):
        yield plan("forward+backward", device, PLAIN, "fp32", layout, 8)
    for batch in BATCHES if full else ():
        yield plan("forward", device, PLAIN, "fp32", "nchw", batch, pixels=32, classes=10)
        yield plan("forward+backward", device, PLAIN, "fp32", "nchw", batch, pixels=32, classes=10)
    for layout in ("nchw", "channels_last"):
        yield Plan(f"head added to a max-pool, forward+backward fp32 {layout} B=8", ("ours", "eager", "none"), partial(added, layout, device), 5)
    for batch in (1, 8, 32) if full else (1, 8):
        yield Plan(f"folded head, forward fp32 nchw B={batch}", ENGINES, partial(folded, batch, device), 2.5)
    yield Plan("head, host time of a call, tiny inputs", HOST, partial(host, device), 2)


def test_case(benchmark: Any, plan: Plan, provider: str, session: Session) -> None:
    session.record(benchmark, plan, provider)


# --- forward, forward and backward ------------------------------------------------------------------------------------
def plan(
    direction: str,
    device: torch.device,
    modes: tuple[str, ...],
    dtype: str,
    layout: str,
    batch: int,
    *,
    warm: bool = False,
    pixels: int = 224,
    classes: int = 1000,
    calls: bool = False,
    seconds: float = 2,
) -> Plan:
    """calls: on a GPU, eager calls as a user makes them instead of replayed graphs."""
    words = ["head", direction, dtype, layout, f"B={batch}"] + ["warm"] * warm + [f"{pixels}px K={classes}"] * (pixels != 224) + ["calls"] * calls
    words += ["beside Triton"] * ("Triton" in modes)
    name = " ".join(words).replace("head ", "head, ", 1)
    limits = ("read", "copy", "launch") if device.type == "cuda" else ("read",)
    return Plan(name, (*modes, *limits), partial(alone, name, direction, modes, dtype, layout, batch, warm, pixels, classes, calls, device), seconds)


def alone(
    name: str,
    direction: str,
    modes: tuple[str, ...],
    dtype: str,
    layout: str,
    batch: int,
    warm: bool,
    pixels: int,
    classes: int,
    calls: bool,
    device: torch.device,
) -> Case:
    maps = at_pixels(HEAD_STAGES, pixels)
    shape = HeadShape(maps, classes, batch, DTYPES[dtype].itemsize)
    sets = feature_maps(maps, batch, dtype, layout, 1 if warm else cold_sets(shape.map_bytes(), device), device)
    training = direction == "forward+backward"
    heads, missing = variants(modes, DTYPES[dtype], classes, device)
    eager = heads["eager"]
    dy = torch.randn(batch, classes, generator=torch.Generator().manual_seed(1)).to(device, DTYPES[dtype])
    parameters = list(eager.parameters())

    def step(head: Callable[..., Tensor], i: int) -> list[Tensor]:
        if not training:
            with torch.inference_mode():
                return [head(sets[i])]
        leaves = [x.detach().requires_grad_() for x in sets[i]]
        y = head(leaves)
        gradients = torch.autograd.grad(y, [*parameters, *leaves], dy)
        return [y, *gradients]

    def expected() -> list[Tensor]:
        exact = InterflowHead(CHANNELS, classes, dtype=torch.float64, device=device)
        exact.load_state_dict({name: value.double() for name, value in eager.state_dict().items()})
        leaves = [x.double().requires_grad_() for x in sets[0]]
        y = exact(leaves)
        return [y.detach(), *torch.autograd.grad(y, [*exact.parameters(), *leaves], dy.double())] if training else [y.detach()]

    providers = {}
    for mode, head in heads.items():
        saved = partial(saved_bytes, lambda head=head: head([x.detach().requires_grad_() for x in sets[0]]), [*sets[0], *parameters])
        provider = Provider(partial(step, head), "ours" if mode == "ours" else "peer", saved=saved if training else None)
        providers[mode] = triton(provider) if mode == "Triton" else provider
    providers["read"] = limit_read([[*s, eager.weight] for s in sets])
    if device.type == "cuda":
        providers |= device_limits(device)
    inputs = "calls" if calls else "warm" if warm else "cold"
    about = {"pass": direction, "dtype": dtype, "layout": layout, "batch": batch, "pixels": pixels, "classes": classes, "inputs": inputs}
    moved = shape.forward_bytes() + (shape.backward_bytes() if training else 0)
    target = []
    if inputs == "cold" and device.type == "cuda" and dtype == "bf16":
        target = (goals.GPU_HEAD_TRAINING if batch == 32 else []) if training else goals.gpu_head(pixels, layout, batch)
    elif inputs == "cold" and device.type == "cpu" and pixels == 224 and not training:
        target = TARGETS.get((dtype, layout, batch), [])
    tolerance = TOLERANCE[DTYPES[dtype]]
    return Case(
        "interflow_head",
        name,
        "wall" if calls else "device",
        providers,
        about,
        len(sets),
        moved,
        batch,
        1,
        expected,
        tolerance,
        {"ours": target, "Triton": goals.GPU_TWIN["interflow_head"]},
        training,
        missing,
    )


def variants(modes: tuple[str, ...], dtype: torch.dtype, classes: int, device: torch.device) -> tuple[dict[str, Any], dict[str, str]]:
    """Heads with one set of parameters, by provider name; and why those that are missing cannot run."""
    torch.manual_seed(0)
    torch.compiler.reset()
    ours = FusedInterflowHead(CHANNELS, classes, "nxn").to(device, dtype)
    make: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours,
        "Triton": lambda: ours,
        "eager": lambda: ours.to_eager(),
        "compiled": lambda: peers.compiled(ours.to_eager()),
        "max-autotune": lambda: peers.compiled(ours.to_eager(), "max-autotune"),
        "TensorRT": lambda: peers.tensorrt(ours.to_eager()),
    }
    made, missing = {}, {}
    for mode in modes:
        try:
            made[mode] = make[mode]()
        except Unavailable as reason:
            missing[mode] = str(reason)
    return made, missing


# --- what the head adds to a training step whose maps a max-pool also consumes ---------------------------------------------
def added(layout: str, device: torch.device) -> Case:
    maps = feature_maps(HEAD_STAGES, 8, "fp32", layout, 1, device)[0]
    heads: dict[str, Any] = {**variants(("ours", "eager"), torch.float32, 1000, device)[0], "none": None}
    leaves = [x.requires_grad_() for x in maps]
    down = [torch.ones_like(F.max_pool2d(x, 2, 2)) for x in maps]

    def step(head: Any, _: int) -> list[Tensor]:
        features = [F.relu(x) for x in leaves]  # made by a ReLU, as in a network: gradients meet behind it
        pooled = [F.max_pool2d(x, 2, 2) for x in features]
        if head is None:
            return list(torch.autograd.grad(pooled, leaves, down))
        return list(torch.autograd.grad([*pooled, head(features).sum()], leaves, [*down, torch.ones((), device=device)]))

    kinds: dict[str, Kind] = {"ours": "ours", "eager": "peer", "none": "base"}
    providers = {name: Provider(partial(step, head), kinds[name]) for name, head in heads.items()}
    about = {"pass": "forward+backward", "dtype": "fp32", "layout": layout, "batch": 8, "pixels": 224, "classes": 1000, "inputs": "warm"}
    goal = goals.adds_less("eager", "none", 4.0 if layout == "channels_last" else 1.0)
    name = f"head added to a max-pool, forward+backward fp32 {layout} B=8"
    return Case(
        "head beside max-pool", name, "device", providers, about, images=8, expected=lambda: step(heads["eager"], 0), tolerance=1e-4, goals={"ours": [goal]}
    )


# --- folded, beside inference engines ----------------------------------------------------------------------------------------
ENGINES = ("ours", "eager", "compiled", "ONNX Runtime", "OpenVINO", "read")


def folded(batch: int, device: torch.device) -> Case:
    shape = HeadShape(HEAD_STAGES, 1000, batch, 4)
    sets = feature_maps(HEAD_STAGES, batch, "fp32", "nchw", cold_sets(shape.map_bytes(), device), device)
    heads, _ = variants(("ours", "eager"), torch.float32, 1000, device)
    ours, eager = heads["ours"].fold(), heads["eager"].fold()

    def run(head: Any, i: int) -> Tensor:
        with torch.inference_mode():
            return head(sets[i])

    providers = {"ours": Provider(partial(run, ours), "ours"), "eager": Provider(partial(run, eager), "peer")}
    providers["compiled"] = Provider(partial(run, peers.compiled(eager)), "peer")
    missing = {}
    for name, engine in (("ONNX Runtime", peers.onnxruntime_head), ("OpenVINO", peers.openvino_head)):
        try:
            if device.type != "cpu":
                raise Unavailable(f"measured on the CPU only, not on {device.type}")
            providers[name] = Provider(engine(peers.onnx_head(eager.weight, eager.bias, HEAD_STAGES, batch), sets), "peer")
        except Unavailable as reason:
            missing[name] = str(reason)
    providers["read"] = limit_read([[*s, eager.weight] for s in sets])
    about = {"pass": "forward", "dtype": "fp32", "layout": "nchw", "batch": batch, "pixels": 224, "classes": 1000, "inputs": "cold"}
    return Case(
        "folded head",
        f"folded head, forward fp32 nchw B={batch}",
        "device",
        providers,
        about,
        len(sets),
        shape.forward_bytes(),
        batch,
        expected=lambda: [heads["eager"](list(sets[0]))],
        missing=missing,
    )


# --- host time ------------------------------------------------------------------------------------------------------------
HOST = ("raw operator", "head(xs)", "eager head(xs)", "torch.empty")


def host(device: torch.device) -> Case:
    maps = [torch.randn(1, 4, 2, 2, device=device) for _ in range(4)]
    head = FusedInterflowHead((4,) * 4, 4).to(device)
    eager = head.to_eager()
    raw = torch.ops.interflow_kernels.interflow_head.default
    arguments = (maps, head.weight, head.bias, head.attention_weight, None, "nxn", (1, 1), False, None)

    def repeated(f: Callable[[], Any], _: int) -> Any:
        with torch.inference_mode():
            for _ in range(100):
                y = f()
        return y

    calls = {"raw operator": lambda: raw(*arguments)[0], "head(xs)": lambda: head(maps), "eager head(xs)": lambda: eager(maps)}
    providers = {name: Provider(partial(repeated, f), "peer" if name.startswith("eager") else "ours") for name, f in calls.items()}
    providers["torch.empty"] = Provider(partial(repeated, lambda: torch.empty(4, 4, device=device)), "limit", bytes=1)
    about = {"pass": "forward", "dtype": "fp32", "layout": "nchw", "batch": 1, "inputs": "warm"}
    targets = {"raw operator": [goals.call_time(9)], "head(xs)": [goals.call_time(16)]}
    return Case(
        "host time", "head, host time of a call, tiny inputs", "wall", providers, about, repeats=100, expected=lambda: [eager(maps)], goals=targets, bytes=0
    )
