"""The head on a GPU: right beside fp64 for odd sizes, addresses and values; the same bits for every run, batch and number of blocks."""

import copy
import random

import pytest
import torch
from on_device import DTYPES, assert_equal_bits, check_head, head_bits, head_on, misaligned, raw_head, raw_head_backward, upstream

from interflow_kernels import FusedInterflowHead, backend, interflow_head
from interflow_kernels.testing import ATTENTIONS, LAYOUTS, HeadCase, assert_close


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_modes_dtypes_layouts(attention, dtype, layout, device):
    check_head(HeadCase(attention=attention, dtype=dtype, layout=layout), device)


@pytest.mark.parametrize("seed", range(24))
def test_odd_sizes(seed, device):
    draw = random.Random(seed)
    maps = tuple((draw.randint(1, 33), draw.randint(1, 17), draw.randint(1, 17)) for _ in range(draw.randint(1, 6)))
    classes = draw.choice([1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 1000, 1001])
    batch = draw.choice([1, 2, 3, 5, 8, 15, 16, 17, 33])
    pool_size = draw.choice([(1, 1), (1, 1), (2, 2), (3, 1)])
    check_head(HeadCase(batch, maps, classes, draw.choice(ATTENTIONS), pool_size, layout=draw.choice(LAYOUTS), dtype=draw.choice(DTYPES)), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_stages_of_vgg16(layout, dtype, device):
    pixels = 112 if device.type == "cuda" else 16
    maps = tuple((c, pixels // 2**i, pixels // 2**i) for i, c in enumerate((128, 256, 512, 512)))
    check_head(HeadCase(3, maps, 1000 if device.type == "cuda" else 40, layout=layout, dtype=dtype), device)


@pytest.mark.parametrize("use", [("y",), ("branches",)], ids="+".join)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_each_gradient_may_be_missing(attention, use, device):
    check_head(HeadCase(attention=attention, bias=False, attention_bias=False), device, use=use)


@pytest.mark.parametrize("by", [1, 2, 3])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_addresses(dtype, layout, by, device):
    case = HeadCase(dtype=dtype, layout=layout, maps=((8, 6, 4), (16, 5, 5)))
    check_head(case, device, [misaligned(x, by) for x in head_on(case, device)[1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pooled_features(dtype, device):
    case = HeadCase(dtype=dtype, maps=((17, 1, 1), (40, 1, 1)))
    pooled = [x.flatten(1) for x in head_on(case, device)[1]]
    check_head(case, device, pooled)
    check_head(case, device, [x.float() for x in pooled])


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_empty_batch(attention, device):
    case = HeadCase(batch=0, attention=attention)
    plain, maps = head_on(case, device)
    found = head_bits(FusedInterflowHead.from_eager(plain), maps, *upstream(case, device))
    assert found["y"].shape == (0, 10)
    assert not found["weight"].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_image(dtype, layout, value, device):
    plain, maps = head_on(HeadCase(layout=layout, attention="classwise", dtype=dtype), device)
    maps[1][1, 3, 2, 5] = value
    y, expected = FusedInterflowHead.from_eager(plain)(maps), plain(maps)
    assert y[0].isfinite().all() and y[2].isfinite().all()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[y.isinf()], expected[y.isinf()])


# --- bits ---------------------------------------------------------------------------------------------------------------
MAPS = ((64, 56, 56), (136, 28, 28), (48, 7, 7))


def prepared(device, **options):
    case = HeadCase(**{"batch": 5, "maps": MAPS, "classes": 100, **options})
    plain, maps = head_on(case, device)
    return FusedInterflowHead.from_eager(plain), maps, *upstream(case, device)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_bits_repeat(attention, layout, device):
    arguments = prepared(device, attention=attention, layout=layout)
    first = head_bits(*arguments)
    for _ in range(100 if device.type == "cuda" else 3):
        assert_equal_bits(first, head_bits(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_an_image_does_not_depend_on_its_batch(attention, layout, dtype, device):
    head, maps, dy, _ = prepared(device, batch=67, maps=((64, 28, 28), (40, 7, 7)), classes=50, attention=attention, layout=layout, dtype=dtype)
    dense = torch.contiguous_format if layout == "contiguous" else torch.channels_last

    def some(chosen):
        part = [x[chosen].contiguous(memory_format=dense) for x in maps]
        return {name: t for name, t in head_bits(head, part, dy[chosen], None).items() if name in ("y", "branches", "features[0]", "features[1]")}

    whole = some(list(range(67)))
    for chosen in ([0], [66], [3, 66, 0, 9, 12, 1, 2], [66, 65], list(range(33))):
        assert_equal_bits({name: t[chosen] for name, t in whole.items()}, some(chosen))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("attention", ["classwise", "gated"])
def test_bits_do_not_depend_on_the_number_of_blocks(attention, layout, device, monkeypatch):
    arguments = prepared(device, batch=19, attention=attention, layout=layout)
    monkeypatch.delenv("INTERFLOW_MAX_BLOCKS", raising=False)
    whole = head_bits(*arguments)
    for blocks in ("1", "2", "7"):
        monkeypatch.setenv("INTERFLOW_MAX_BLOCKS", blocks)
        assert_equal_bits(whole, head_bits(*arguments))


# --- wiring -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_opcheck(attention, device):
    for layout in ("contiguous", "channels_last"):
        case = HeadCase(batch=2, maps=((4, 6, 5), (8, 3, 3)), classes=5, attention=attention, layout=layout)
        plain, maps = head_on(case, device)
        given = [plain.weight, plain.bias, plain.attention_weight, plain.attention_bias]
        torch.library.opcheck(raw_head, [[x.requires_grad_() for x in maps], *given, attention, [1, 1], True, None])
        rest = [torch.randn(2, 12, device=device), *(t.detach() for t in given), attention, [4, 8], [0, 1], True, True, True]
        tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        torch.library.opcheck(raw_head_backward, [torch.randn(2, 5, device=device), None, *rest], test_utils=tests)


@pytest.mark.parametrize("attention", ["nxn", "gated"])
def test_compile_fullgraph(attention, device):
    torch._dynamo.reset()
    head, maps, dy, _ = prepared(device, batch=2, maps=((8, 6, 5), (16, 3, 3)), attention=attention)
    compiled = torch.compile(head, fullgraph=True)
    results = []
    for f in (compiled, head):
        leaves = [x.detach().requires_grad_() for x in maps]
        y = f(leaves)
        results.append([y.detach(), *torch.autograd.grad(y, [*leaves, *head.parameters()], dy)])
    for got, want in zip(*results, strict=True):
        assert_close("compiled", got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    head, maps, *_ = prepared(device, batch=2, maps=((8, 6, 5), (16, 3, 3)))
    with torch.autocast(device.type, dtype=dtype):
        y = head([maps[0].to(dtype), maps[1]])
        raw = raw_head([maps[0].to(dtype), maps[1]], *[t.detach() for t in head.parameters()], "nxn", [1, 1], False, None)[0]
    assert y.dtype == raw.dtype == dtype
    assert torch.equal(y, raw)
    exact = copy.deepcopy(head.to_eager()).double()([maps[0].to(dtype).double(), maps[1].double()]).detach()
    assert float((y.detach().double() - exact).abs().max() / exact.abs().max()) < 2 * torch.finfo(dtype).eps
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in head.parameters())


@pytest.mark.gpu
def test_fp64_takes_pytorchs_operators():
    plain, maps = head_on(HeadCase(dtype=torch.float64), "cuda")
    with backend("auto"):
        y = FusedInterflowHead.from_eager(plain)(maps)
    assert torch.equal(y, plain(maps))
    with pytest.raises(RuntimeError, match="fp64"):
        raw_head(maps, plain.weight, plain.bias, plain.attention_weight, plain.attention_bias, "nxn", [1, 1], False, None)
    with pytest.raises(RuntimeError, match="no fp64 kernels for device 'cuda'"):
        FusedInterflowHead.from_eager(plain)(maps)


@pytest.mark.gpu
def test_wrong_devices_are_named():
    plain, maps = head_on(HeadCase(), "cuda")
    head, given = FusedInterflowHead.from_eager(plain), [plain.weight, plain.bias, plain.attention_weight]
    with pytest.raises(ValueError, match=r"features\[1\] must be on the device of weight, cuda:0, got cpu"):
        head([maps[0], maps[1].cpu(), maps[2]])
    with pytest.raises(ValueError, match="bias must be on the device of weight, cuda:0, got cpu"):
        interflow_head(maps, given[0], given[1].cpu(), given[2])
    for bad in ([[maps[0], maps[1].cpu(), maps[2]], *given, None], [maps, given[0], given[1].cpu(), given[2], None]):
        with pytest.raises(RuntimeError, match="device"):
            raw_head(*bad, "nxn", [1, 1], False, None)


@pytest.mark.gpu
def test_backward_is_three_launches_and_writes_nothing_of_a_maps_size():
    head, maps, dy, _ = prepared("cuda", batch=8, maps=((64, 64, 64), (64, 64, 64)))
    leaves = [x.requires_grad_() for x in maps]
    y = head(leaves)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(y, [*head.parameters()], dy, retain_graph=True)
        torch.cuda.synchronize()
    ours = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA and "interflow" in e.name]
    assert 0 < len(ours) <= 3, ours
    torch.autograd.grad(y, leaves, dy)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < maps[0].nbytes / 4
