"""The stage tap on a GPU: to the bit what PyTorch's own operators give on a CPU; the same bits for every run, batch and number of blocks."""

import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from on_device import DTYPES, assert_equal_bits, check_tap, misaligned, raw_tap, tap_bits, tap_on, tap_upstream

from interflow_kernels import StageTap, backend, stage_tap
from interflow_kernels.testing import LAYOUTS, TapCase, assert_same_bits, composed_tap, in_layout

FORMS = pytest.mark.parametrize("max_pool", [True, False], ids=["pooled", "mean"])


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_layouts_shifts(dtype, layout, max_pool, device):
    for shift, special in product(("none", "own", "fp32", "strided"), (False, True)):
        check_tap(*tap_on(TapCase(dtype=dtype, layout=layout, max_pool=max_pool, shift=shift, special=special), device), max_pool)


@FORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(dtype, layout, max_pool, device):
    draw = random.Random(f"{dtype}{layout}{max_pool}")
    for number in range(20 if device.type == "cuda" else 5):
        shape = (draw.randint(1, 5), draw.randint(1, 33), draw.randint(1, 17), draw.randint(1, 17))
        check_tap(*tap_on(TapCase(shape, dtype, layout, max_pool, special=number % 2 == 0), device, number), max_pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_shapes(dtype, device):
    shapes = [(2, 515, 5, 4), (1, 2, 3, 1030), (2, 64, 57, 55), (1, 4200, 3, 2), (1, 1, 130, 131)]
    for shape in [*shapes, (4, 64, 224, 224)] if device.type == "cuda" else shapes[:3]:
        for layout, max_pool in product(("contiguous", "channels_last", "sliced"), (True, False)):
            check_tap(*tap_on(TapCase(shape, dtype, layout, max_pool), device), max_pool)


@FORMS
@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_addresses(dtype, by, max_pool, device):
    for layout, width in product(("contiguous", "channels_last"), (8, 9, 16)):
        u, shift = tap_on(TapCase((2, 16, 6, width), dtype, layout, max_pool), device)
        check_tap(misaligned(u, by), misaligned(shift, by), max_pool)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_window_of_special_values(dtype, device):
    nan, inf, small = float("nan"), float("inf"), torch.finfo(dtype).smallest_normal / 4
    values = torch.tensor([nan, inf, -inf, 0.0, -0.0, small, -small, 1.0, 2.0, -1.0], dtype=torch.float64).to(dtype)
    windows = torch.cartesian_prod(*[values] * 4).reshape(1, -1, 2, 2).to(device)
    row = windows[0].permute(1, 0, 2).reshape(1, 1, 2, -1).contiguous()
    for shift in (None, torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([nan])):
        check_tap(row, None if shift is None else shift.to(device), True)
    for layout, max_pool in product(("contiguous", "channels_last"), (True, False)):
        check_tap(in_layout(windows, layout), None, max_pool)


@FORMS
@pytest.mark.parametrize("shape", [(0, 5, 4, 6), (2, 0, 4, 6), (3, 5, 1, 6), (3, 5, 4, 1), (2, 3, 1, 1)], ids=str)
def test_empty_and_thin(shape, max_pool, device):
    u, shift = tap_on(TapCase(shape, max_pool=max_pool), device)
    found = tap_bits(u, shift, max_pool, *tap_upstream(u, max_pool))
    assert found["p"].shape == shape[:2] and found["du"].shape == shape
    if u.numel():
        assert_same_bits("du", found["du"], tap_bits(in_layout(u, "permuted"), shift, max_pool, *tap_upstream(u, max_pool))["du"])


# --- bits ---------------------------------------------------------------------------------------------------------------
@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bits_repeat(layout, max_pool, device):
    u, shift = tap_on(TapCase((4, 64, 56, 56), torch.bfloat16, layout, max_pool), device)
    first = tap_bits(u, shift, max_pool, *tap_upstream(u, max_pool))
    for _ in range(100 if device.type == "cuda" else 2):
        assert_equal_bits(first, tap_bits(u, shift, max_pool, *tap_upstream(u, max_pool)))


@FORMS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_does_not_depend_on_its_batch_nor_bits_on_the_number_of_blocks(dtype, layout, max_pool, device, monkeypatch):
    monkeypatch.delenv("INTERFLOW_MAX_BLOCKS", raising=False)
    u, shift = tap_on(TapCase((9, 40, 29, 30), dtype, layout, max_pool), device)
    dm, dp = tap_upstream(u, max_pool)
    whole = tap_bits(u, shift, max_pool, dm, dp)
    for chosen in ([0], [8, 3], [1, 2, 3, 4, 5]):
        some = tap_bits(in_layout(u[chosen], layout), shift, max_pool, None if dm is None else dm[chosen], dp[chosen])
        assert_equal_bits({name: t[chosen] for name, t in whole.items() if name != "dshift"}, some)
    for blocks in ("1", "2", "7"):
        monkeypatch.setenv("INTERFLOW_MAX_BLOCKS", blocks)
        assert_equal_bits(whole, tap_bits(u, shift, max_pool, dm, dp))


# --- wiring -------------------------------------------------------------------------------------------------------------
@FORMS
def test_opcheck(max_pool, device):
    for layout in ("contiguous", "channels_last", "permuted"):
        u, shift = tap_on(TapCase((2, 5, 5, 6), layout=layout), device)
        torch.library.opcheck(raw_tap, [u.requires_grad_(), shift.requires_grad_(), max_pool, True])


@FORMS
def test_compile_fullgraph(max_pool, device):
    torch._dynamo.reset()
    tap = StageTap(max_pool)
    u, shift = tap_on(TapCase((2, 12, 7, 6), layout="channels_last"), device)
    results = []
    for f in (torch.compile(tap, fullgraph=True), tap):
        leaves = [u.detach().requires_grad_(), shift.detach().requires_grad_()]
        outputs = [t for t in f(*leaves) if t is not None]
        results.append([*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], leaves)])
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert_same_bits(str(i), got, want)


def test_autocast_changes_nothing(device):
    u, shift = tap_on(TapCase(dtype=torch.bfloat16), device)
    with torch.autocast(device.type, dtype=torch.float16):
        m, p = stage_tap(u, shift)
    assert (m.dtype, p.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.gpu
def test_fp64_takes_pytorchs_operators():
    u, shift = tap_on(TapCase(dtype=torch.float64), "cuda")
    with backend("auto"):
        m, p = stage_tap(u, shift)
    assert p.dtype == torch.float64
    assert torch.equal(m.cpu(), composed_tap(u.cpu(), shift.cpu())[1])
    with pytest.raises(RuntimeError, match="fp64"):
        raw_tap(u, shift, True, True)


@pytest.mark.gpu
def test_wrong_devices_are_named():
    u, shift = tap_on(TapCase(), "cuda")
    with pytest.raises(ValueError, match="shift must be on the device of u, cuda:0, got cpu"):
        stage_tap(u, shift.cpu())
    with pytest.raises(RuntimeError, match="shift"):
        raw_tap(u, shift.cpu(), True, True)


@pytest.mark.gpu
def test_one_launch_each_way():
    u, shift = tap_on(TapCase((8, 64, 56, 56), torch.bfloat16, "channels_last"), "cuda")
    leaves = [u.requires_grad_(), shift.requires_grad_()]
    stage_tap(*leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        m, p = stage_tap(*leaves)
        torch.autograd.grad([m, p], leaves, [torch.ones_like(m), torch.ones_like(p)])
        torch.cuda.synchronize()
    ours = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "tap_" in e.name]
    assert len(ours) == 2, ours


def test_max_pool_of_pytorch_is_what_this_file_takes_it_for():
    """The composition that everything here is compared with gives NaN, ties and zeros their usual places."""
    u = torch.tensor([[1.0, 1.0], [float("nan"), 0.0]]).reshape(1, 1, 2, 2)
    assert F.max_pool2d(u, 2, 2).isnan().all()
    assert F.max_pool2d(u.nan_to_num(), 2, 2, return_indices=True)[1].item() == 0
    zero = F.relu(torch.tensor([-0.0]))
    assert zero.item() == 0 and torch.signbit(zero).all()  # torch 2.11 gives +0 on CUDA


def test_no_expectation_is_composed_on_another_device():
    """There PyTorch's own operators may have other bits than the tap, which is right."""
    with pytest.raises(ValueError, match="u must be on the CPU, .* got meta; call .cpu"):
        composed_tap(torch.empty(1, 2, 4, 4, device="meta"), None)
    with pytest.raises(ValueError, match="shift must be on the CPU"):
        composed_tap(torch.ones(1, 2, 4, 4), torch.ones(2, device="meta"))
