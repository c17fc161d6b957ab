"""Triton's kernels compiled for every GPU target without a GPU: registers, spills, 16-byte accesses, matrix units, arguments."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install triton)")

from triton_offline import TARGETS, compiled, recorded, resources, runtime_arguments, vgg16_maps

from interflow_kernels.triton.common import products
from interflow_kernels.triton.interflow_head.backward import interflow_head_backward
from interflow_kernels.triton.interflow_head.forward import interflow_head
from interflow_kernels.triton.interflow_head.pool import interflow_pool
from interflow_kernels.triton.stage_end.backward import stage_end_backward
from interflow_kernels.triton.stage_end.forward import stage_end
from interflow_kernels.triton.stage_tap.backward import stage_tap_backward
from interflow_kernels.triton.stage_tap.forward import stage_tap

K, WIDTHS = 1000, [128, 256, 512, 512]


def tap_launches(dtype, layout, max_pool=True, side=112):
    u = torch.empty(2, 128, side, side, dtype=dtype)
    u = u.to(memory_format=torch.channels_last) if layout == "channels_last" else u
    with recorded() as launches:
        m, p, mask = stage_tap(u, torch.empty(128), max_pool, True)
        stage_tap_backward(m if max_pool else None, p, mask, u, max_pool, layout == "channels_last", True)
    return launches


def end_launches(dtype, layout, activation="relu", residual=True, side=14):
    u = torch.empty(2, 128, side, side, dtype=dtype)
    u = u.to(memory_format=torch.channels_last) if layout == "channels_last" else u
    with recorded() as launches:
        v, p = stage_end(u, torch.empty(128), u if residual else None, activation)
        stage_end_backward(v, p, v if activation == "relu" else None, u, layout == "channels_last", True)
    return launches


def head_launches(dtype, layout, attention, source="maps", target="sm_90", widths=WIDTHS):
    n = len(widths)
    weight, bias, matrix, offset = (torch.empty(shape, dtype=dtype) for shape in ((K, sum(widths)), (n, K), (n, n), (n,)))
    features = vgg16_maps(2, dtype, layout) if source == "maps" else [torch.empty(2, w) for w in widths]
    with recorded(target) as launches:
        y, _, pooled = interflow_head(features, weight, bias, matrix, offset, attention, [1, 1], False, None)
        parameters = (weight, bias, matrix, offset, attention, widths)
        interflow_head_backward(y, None, pooled, *parameters, list(range(n)), True, True, True)
    return {launch.kernel.__name__: launch for launch in launches}


# Registers a thread may take, as measured with Triton 3.6 and 3.9, and some room; none may spill. Four warps of 128 registers
# leave four programs on a multiprocessor of NVIDIA's.
CEILINGS = {
    "tap_pixels": 128,
    "tap_pixels_backward": 128,
    "tap_planes": 128,
    "tap_planes_backward": 128,
    "end_pixels": 128,
    "end_pixels_backward": 128,
    "end_planes": 128,
    "end_planes_backward": 128,
    "sum_rows": 64,
    "head_pool": 144,
    "head_pool_whole": 144,
    "head_tail": 192,
    "head_scores": 192,
    "head_gradients": 255,
    "head_attention": 128,
    "head_gate": 72,
}


def check(launch, target):
    name = launch.kernel.__name__
    assert runtime_arguments(launch) <= 12, name
    found = resources(compiled(launch, TARGETS[target]))
    assert found.spilled == 0, (name, target, found)
    assert found.registers <= CEILINGS[name], (name, target, found)
    return found


ALL = ("sm_90", "gfx942", "gfx1100")
MATRIX_UNITS = tuple(target for target in TARGETS if target != "gfx1100")  # RDNA 3's take no fp32: multiply-adds


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("target", TARGETS)
def test_tap(target, layout):
    forward, backward, rows = tap_launches(torch.bfloat16, layout)
    found = check(forward, target)
    assert found.loads >= (4 if target.startswith("sm") else 1) and found.stores >= 1
    found = check(backward, target)
    if layout == "channels_last" or target.startswith("sm"):
        assert found.stores >= 4
    check(rows, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_tap_of_other_dtypes_and_forms(layout, dtype):
    for max_pool in (True, False):
        for launch in tap_launches(dtype, layout, max_pool, side=28)[:2]:
            check(launch, "sm_90")


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("target", ALL)
def test_end(target, layout):
    forward, backward, rows = end_launches(torch.bfloat16, layout, side=56)
    for launch in (forward, backward):
        found = check(launch, target)
        assert found.loads >= 2 and found.stores >= 1
    check(rows, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_end_of_other_dtypes_and_forms(layout, dtype):
    for activation, residual, side in (("relu", False, 7), ("none", True, 14)):
        for launch in end_launches(dtype, layout, activation, residual, side)[:2]:
            check(launch, "sm_90")


@pytest.mark.parametrize("target", TARGETS)
def test_head_of_bf16_maps(target):
    launches = head_launches(torch.bfloat16, "channels_last", "nxn", target=target)
    assert list(launches) == ["head_pool", "head_tail", "head_gradients", "head_attention"]
    assert check(launches["head_pool"], target).loads >= 8
    assert (check(launches["head_tail"], target).matrix > 0) == (target in MATRIX_UNITS)
    if target in ALL:
        assert (check(launches["head_gradients"], target).matrix > 0) == (target in MATRIX_UNITS)
        check(launches["head_attention"], target)


@pytest.mark.parametrize("target", ALL)
def test_pool_of_bf16_maps(target):
    for layout in ("channels_last", "contiguous"):
        with recorded(target) as launches:
            interflow_pool(vgg16_maps(2, torch.bfloat16, layout), [1, 1])
        assert [launch.kernel.__name__ for launch in launches] == ["head_pool_whole"]
        check(launches[0], target)


@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_head_of_pooled_fp32_features(attention, target):
    if attention == "classwise":
        launches = head_launches(torch.float32, "contiguous", "nxn", "pooled", target)
        assert list(launches) == ["head_tail", "head_gradients", "head_attention"]
    else:
        launches = head_launches(torch.float32, "contiguous", "gated", "pooled", target)
        assert list(launches) == ["head_tail", "head_scores", "head_gradients", "head_gate"]
    for launch in launches.values():
        check(launch, target)


@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_gradients_of_half_precision_weights(dtype, target):
    """Products of other parts than fp32's: fp16 in two, bf16 in one."""
    check(head_launches(dtype, "contiguous", "nxn", "pooled", target)["head_gradients"], target)


# Of 16 stages' gates: what leaves as many waves on a SIMD, or warps on a multiprocessor, as the fewest registers that any version of Triton found.
# gfx942 has 512 a lane, two waves from 171 to 256 each (Triton 3.9: 202, 3.8: 226).
# gfx1100 takes 244 for the tail since its products are compensated, up to 208 before.
OF_SIXTEEN = {"sm_90": 208, "gfx942": 256, "gfx1100": 248}


@pytest.mark.parametrize("target", ALL)
def test_gates_of_sixteen_stages(target):
    launches = head_launches(torch.bfloat16, "contiguous", "gated", "pooled", target, [96] * 16)
    found = resources(compiled(launches["head_scores"], TARGETS[target]))
    assert found.spilled == 0 and found.registers <= OF_SIXTEEN[target], found
    if target != "sm_90":  # where head_tail takes half a minute to compile
        found = resources(compiled(launches["head_tail"], TARGETS[target]))
        assert found.spilled == 0 and found.registers <= OF_SIXTEEN[target], found


def test_no_programs_are_no_launch():
    with recorded() as launches:
        interflow_head([torch.empty(2, 0, 4, 4)], torch.empty(3, 0), None, torch.empty(1), None, "1xn", [1, 1], False, None)
    assert [launch.kernel.__name__ for launch in launches] == ["head_tail"]


def test_pooled_maps_of_nchw():
    assert check(head_launches(torch.bfloat16, "contiguous", "nxn")["head_pool"], "sm_90").loads >= 8


def test_products_keep_fp32s_error_and_sums_are_not_fused():
    """No TF32, no fused multiply-add where the kernels write a product and a sum, no atomics on floats."""
    launches = head_launches(torch.float32, "contiguous", "gated", "pooled")
    text = compiled(launches["head_tail"], TARGETS["sm_90"]).asm["ptx"]
    assert "bf16" in text and "tf32" not in text
    for launch in (*launches.values(), *tap_launches(torch.bfloat16, "channels_last")):
        code = compiled(launch, TARGETS["sm_90"]).asm["ptx"]
        assert not re.search(r"(?:atom|red)\.\S*\.f(?:16|32|64)", code), launch.kernel.__name__
        if "tap" in launch.kernel.__name__:
            assert not re.search(r"\bfma\.rn\.f32", code.replace("div.rn", "")), launch.kernel.__name__


@pytest.mark.parametrize(("target", "instruction"), [("gfx942", r"v_mfma_f32_\d+x\d+x\d+_f32"), ("gfx1100", "v_dual_fmac_f32")])
def test_amds_products_multiply_fp32_as_it_is(target, instruction):
    for dtype in (torch.float32, torch.bfloat16):
        launches = head_launches(dtype, "contiguous", "gated", "pooled", target)
        for name in ("head_tail", "head_scores", "head_gradients"):
            code = compiled(launches[name], TARGETS[target]).asm["amdgcn"]
            assert re.search(instruction, code) and not re.search(r"v_mfma_\S*bf16|v_wmma", code), name


@pytest.mark.parametrize(
    ("device", "hip", "capability", "width", "expected"),
    [
        ("cuda:0", None, (8, 0), 32, "parts"),
        ("cuda:0", None, (12, 0), 32, "parts"),
        ("cuda:0", None, (7, 5), 32, "multiply-adds"),
        ("cuda:0", "6.4", (11, 0), 32, "multiply-adds"),
        ("cuda:0", "6.4", (9, 4), 64, "fp32 units"),
        ("xpu:0", None, None, None, "parts"),
        ("cpu", None, None, None, "parts"),
    ],
)
def test_products_take_the_way_of_their_gpu(device, hip, capability, width, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(warp_size=width))
    assert products.products_on.__wrapped__(torch.device(device)) == expected


def test_a_spill_is_seen():
    """That the ceilings can fail: the head's tail in four times the columns at a time does spill."""
    launch = head_launches(torch.float32, "contiguous", "nxn", "pooled")["head_tail"]
    wide = launch._replace(constants=(*launch.constants[:-2], 128, True))
    assert resources(compiled(wide, TARGETS["sm_90"])).spilled > 0


LAUNCHING = """
import sys
sys.path.insert(0, {folder!r})
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

seen, ways = [], []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        ways.append("usual" if any(isinstance(a, torch.Tensor) for a in arguments) else "short")
        seen.append((self.name, x, y, z, function, metadata, [form(a) for a in arguments]))


class Address(int):
    def __new__(cls, t):
        made = super().__new__(cls, t.data_ptr())
        made.tensor = t
        return made


def form(a):
    t = getattr(a, "tensor", a)
    return (t.dtype, t.shape, t.stride()) if isinstance(t, torch.Tensor) else t


class Driver:
    class utils:
        load_binary = staticmethod(lambda *a: (1, 2, 64, 0, 1024))
        get_device_properties = staticmethod(lambda device: dict(max_shared_mem=232448, multiprocessor_count=132))
        unload_module = staticmethod(lambda module: None)

    launcher_cls = Launcher
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


driver.set_active(Driver())
from test_triton_compiled import WIDTHS
from interflow_kernels.triton.common import launch as launcher
from interflow_kernels.triton.interflow_head.backward import interflow_head_backward
from interflow_kernels.triton.interflow_head.forward import interflow_head
from interflow_kernels.triton.stage_tap.backward import stage_tap_backward
from interflow_kernels.triton.stage_tap.forward import stage_tap
launcher.options = lambda maker, *rest, options=launcher.options: options("cuda", *rest)
launcher._address = Address


def calls(batch, displaced=0, behind=0):
    seen.clear(), ways.clear()
    count = batch * 64 * 120
    u = torch.empty(displaced + count + behind, dtype=torch.bfloat16)[displaced : displaced + count].view(batch, 64, 12, 10)
    m, p, mask = stage_tap(u, None, True, True)
    stage_tap_backward(m, p, mask, u, True, False, True)
    parameters = (torch.empty(20, sum(WIDTHS)), None, torch.empty(4, 4), torch.empty(4), "nxn")
    y, _, pooled = interflow_head([torch.empty(batch, w) for w in WIDTHS], *parameters, [1, 1], False, None)
    interflow_head_backward(y, None, pooled, *parameters, WIDTHS, [0], True, True, True)
    return list(seen)


first = calls(3)
assert set(ways) == {{"usual"}}
compiled = dict(launcher._compiled)
assert [c[0] for c in first] == ["tap_planes", "tap_planes_backward", "sum_rows", "head_tail", "head_gradients", "head_attention"], first
assert calls(3) == first and set(ways) == {{"short"}}  # the launcher gets the same
calls(16), calls(1)
assert launcher._compiled == compiled  # no batch size compiles anew

entered = []
hook = lambda metadata: entered.append(metadata)
triton.knobs.runtime.launch_enter_hook.add(hook)
assert calls(3) == first and set(ways) == {{"usual"}}  # a profiler's hooks are not passed over
triton.knobs.runtime.launch_enter_hook.remove(hook)
assert calls(3) == first and set(ways) == {{"short"}}

calls(3, displaced=1)
assert ways == ["usual", *["short"] * 5], ways  # code for aligned tensors does not get others
assert len(launcher._compiled) == len(compiled) + 1
torch.version.hip = "6.4"
calls(5), calls(6, behind=2**30)
assert len(launcher._compiled) == len(compiled) + 2  # AMD's code for memory within 2 GiB does not get more
with launcher.noted(launching=False) as launches:
    assert calls(3) == []
assert [launch.kernel.__name__ for launch in launches] == [c[0] for c in first]
print("done")
"""


def test_the_short_way_hands_over_the_same_arguments():
    """With a driver that loads and launches nothing: what reaches the launcher by Triton's own way, and by ours; and when ours is not taken."""
    code = LAUNCHING.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "done"
