"""StageTap and TapConv2d as modules."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interflow_kernels import StageTap, TapConv2d, stage_tap
from interflow_kernels.testing import TapCase, assert_close, tap_inputs


def test_stage_tap_module():
    u, shift = tap_inputs(TapCase())
    for tap in (StageTap(), StageTap(False)):
        assert not list(tap.parameters()) and not tap.state_dict()
        assert repr(tap) == f"StageTap(max_pool={tap.max_pool})"
        for other in (tap, copy.deepcopy(tap), pickle.loads(pickle.dumps(tap))):
            for given in (shift, None):
                for got, want in zip(other(u, given), stage_tap(u, given, max_pool=tap.max_pool), strict=True):
                    assert (got is None and want is None) or torch.equal(got, want)


CONVOLUTIONS = [
    dict(),
    dict(padding=1),
    dict(padding=1, padding_mode="reflect"),
    dict(padding="same", padding_mode="circular"),
    dict(groups=2, stride=2),
    dict(dilation=2),
]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_tap_convolution(options):
    torch.manual_seed(1)
    plain = nn.Conv2d(4, 6, 3, **options)
    torch.manual_seed(1)
    tapped = TapConv2d(4, 6, 3, **options)
    assert list(tapped.state_dict()) == list(plain.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(tapped.state_dict().values(), plain.state_dict().values(), strict=True))
    assert repr(tapped).replace("TapConv2d", "Conv2d") == repr(plain)
    x = torch.randn(2, 4, 12, 11)
    assert_close("conv", tapped(x) + tapped.bias[:, None, None], plain(x))
    m, p = StageTap()(tapped(x), tapped.bias)
    v = F.relu(plain(x))
    assert_close("m", m, F.max_pool2d(v, 2, 2))
    assert_close("p", p, v.mean((2, 3)))
    (m.sum() + p.sum()).backward()
    (F.max_pool2d(v, 2, 2).sum() + v.mean((2, 3)).sum()).backward()
    for (name, a), b in zip(tapped.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, a.grad, b.grad, 1e-5)
    assert pickle.loads(pickle.dumps(tapped)).load_state_dict(plain.state_dict())


def test_tap_convolution_keeps_parametrizations_and_hooks():
    conv, x = TapConv2d(4, 6, 3), torch.randn(2, 4, 8, 8)
    before = conv(x)
    torch.nn.utils.parametrizations.weight_norm(conv)
    assert_close("weight norm", conv(x), before)
    StageTap()(conv(x), conv.bias)[1].sum().backward()
    assert all(t.grad is not None for t in conv.parameters())
    assert len(list(conv.parameters())) == 3
    seen = []
    conv.register_forward_pre_hook(lambda module, args: seen.append("before"))
    conv.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    conv(x)
    assert seen == ["before", (2, 6, 6, 6)]
    unbiased = TapConv2d(4, 6, 3, bias=False)
    m, _ = StageTap()(unbiased(x), unbiased.bias)
    assert torch.equal(m, F.max_pool2d(F.relu(unbiased(x)), 2, 2))
