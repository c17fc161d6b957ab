"""Every family of timm that gives feature maps, its smallest model: `make test-backbones`. Five attentions in turn, both memory formats."""

import functools

import pytest
import torch

from interflow_vision import attach

timm = pytest.importorskip("timm", reason="timm (extra [backbones]) is not installed")
pytestmark = pytest.mark.slow

FAMILIES = [name for name in timm.list_modules() if name != "timm_registry"]  # that one is this package's
ATTENTIONS = ("hard", "1xn", "nxn", "classwise", "gated")
SMALL = ("test", "zepto", "atto", "femto", "pico", "nano", "xxs", "xxt", "tiny", "mini", "xs", "xt", "_s", "small", "18", "_t", "b0", "a0", "m0", "_0")
LARGEST = 40e6
"""Parameters; a family whose smallest model has more does not run on two cores in reasonable time."""


def candidates(module: str) -> list[str]:
    """The models of a family that are called small, and the first few."""
    names = timm.list_models(module=module)
    by_word = sorted(names, key=lambda name: (next((i for i, word in enumerate(SMALL) if word in name), len(SMALL)), len(name)))
    return by_word[:4]


@functools.cache
def smallest(module: str) -> tuple[str, int] | None:
    """The candidate with the fewest parameters among those that give features, built without memory."""
    found = []
    for name in candidates(module):
        try:
            with torch.device("meta"):
                net = timm.create_model(name, features_only=True)
        except Exception:  # no features, or its constructor computes numbers
            try:
                net = timm.create_model(name, features_only=True)
            except Exception:
                continue
        found.append((sum(p.numel() for p in net.parameters()), name))
    return (min(found)[1], min(found)[0]) if found else None


@pytest.mark.parametrize("module", FAMILIES)
def test_a_family(module):
    number = FAMILIES.index(module)
    chosen = smallest(module)
    if chosen is None:
        pytest.skip(f"none of {', '.join(candidates(module))} gives feature maps")
    name, size = chosen
    if size > LARGEST:
        pytest.skip(f"its smallest model, {name}, has {size / 1e6:.0f} million parameters")
    attention = ATTENTIONS[number % 5]
    fused = attach(name, 3, attention=attention)
    eager = attach(name, 3, attention=attention, head="eager", stage_end="eager")
    eager.load_state_dict(fused.state_dict())
    channels, height, width = fused.default_cfg["input_size"]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(1)).to(memory_format=memory_format)
        got, expected = (_gradients(net.to(memory_format=memory_format).eval(), x) for net in (fused, eager))
        for key, value in expected.items():
            bound = 1e-3 * max(float(value.abs().max()), 1e-6 * max(float(v.abs().max()) for v in expected.values()))
            torch.testing.assert_close(got[key], value, rtol=1e-3, atol=bound, msg=lambda text, key=key: f"{name}, {key}: {text}")


def _gradients(net, x):
    net.zero_grad()
    y = net(x)
    y.square().sum().backward()
    return {"y": y.detach(), **{name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}}
