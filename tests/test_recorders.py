"""What records a network with heads and taps in it: torch.jit.trace, torch.export, torch.fx, ONNX; and what refuses to."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from interflow_kernels import FusedInterflowHead, StageTap, conv_tap, interflow_head, stage_tap
from interflow_kernels.testing import ATTENTIONS, assert_close

CLASSES = 3


class Network(nn.Module):
    """A convolution, a tap, a convolution, a head on a pooled and an unpooled stage."""

    def __init__(self, head):
        super().__init__()
        self.first, self.tap, self.last, self.head = nn.Conv2d(3, 8, 3), StageTap(), nn.Conv2d(8, 4, 1), head

    def forward(self, x):
        m, p = conv_tap(self.first, self.tap, x)
        return self.head([p.to(m.dtype), self.last(m)])


def network(kind="nxn"):
    torch.manual_seed(0)
    head = FusedInterflowHead((8, 4), CLASSES, "nxn" if kind in ("folded", "eager") else kind)
    return Network(head.fold() if kind == "folded" else head.to_eager() if kind == "eager" else head)


def images(batch, size=10):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def gradients(module, x):
    module.zero_grad()
    module(x).sin().sum().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters()}


def assert_same(recorded, module, x, bits=True):
    """Outputs and every gradient, by name; without `bits`, but for rounding."""
    assert torch.equal(recorded(x), module(x)) if bits else torch.allclose(recorded(x), module(x), atol=1e-6)
    want = gradients(module, x)
    got = gradients(recorded, x)
    assert got.keys() == want.keys()
    for name in want:
        assert want[name].abs().max() > 0
        assert_close(name, got[name], want[name], 1e-6 if bits else 1e-5)


# --- torch.jit ---------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", [*ATTENTIONS, "folded"])
def test_jit_trace(kind):
    """With gradients on, checked against a second trace without, saved, loaded, run on another batch and size, differentiated."""
    module = network(kind).eval()
    traced = torch.jit.trace(module, images(2))
    assert "interflow_kernels::interflow_head" in str(traced.inlined_graph) and "interflow_kernels::stage_tap" in str(traced.inlined_graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for recorded in (traced, torch.jit.load(buffer)):
        assert_same(recorded, module, images(5, 13))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(module, images(2))(images(3)), module(images(3)))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace_of_a_head_with_windows():
    head = FusedInterflowHead((4, 8), CLASSES, "gated", pool_size=2).eval()
    maps = lambda batch: [torch.randn(batch, 4, 5, 6), torch.randn(batch, 8, 3, 3)]  # noqa: E731
    assert_same(torch.jit.trace(head, (maps(2),)), head, maps(3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_script_is_refused_in_a_sentence():
    head = FusedInterflowHead((8, 4), CLASSES)
    for module in (head, head.to_eager(), head.fold(), StageTap(), network()):
        with pytest.raises(NotImplementedError, match=r"^torch.jit.script cannot compile \w+; use torch.jit.trace or torch.export.export$"):
            torch.jit.script(module)


# --- torch.export ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", ["nxn", "folded"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(kind, strict, dynamic):
    module = network(kind)
    shapes = ({0: torch.export.Dim("batch", min=1, max=64)},) if dynamic else None
    program = torch.export.export(module, (images(2),), dynamic_shapes=shapes, strict=strict)
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [t for t in targets if "interflow_kernels" in t] == ["interflow_kernels.stage_tap.default", "interflow_kernels.interflow_head.default"]
    assert not [t for t in targets if "set_grad_enabled" in t or "autograd" in t]
    assert_same(program.module(), module, images(5 if dynamic else 2))


# --- torch.fx ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["nxn", "folded", "eager"])
def test_fx_takes_modules_as_leaves(kind):
    module = network(kind)
    traced = torch.fx.symbolic_trace(module)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["first", "tap", "last", "head"]
    assert {"tap", "head"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}
    # In the graph the convolution is a module of its own and adds its bias: other roundings than conv_tap's.
    for recorded in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert_same(recorded, module, images(5, 13), bits=False)


class Functions(nn.Module):
    """The functions instead of the modules, a mapping of features, and the branches of a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), FusedInterflowHead((4,), CLASSES, layout="NHWC")

    def forward(self, x):
        u = self.conv(x)
        _m, p = stage_tap(u, self.conv.bias)
        y = interflow_head({"u": u}, self.head.weight, self.head.bias, self.head.attention_weight, pool_size=1)
        return y + self.head.forward_branches([u.permute(0, 2, 3, 1)])[1].sum(1) + p[:, :CLASSES] + stage_tap(u, max_pool=False)[1][:, :CLASSES]


def test_fx_takes_functions_as_leaves():
    module = Functions()
    traced = torch.fx.symbolic_trace(module)
    functions = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert functions.count(stage_tap) == 2 and functions.count(interflow_head) == 1
    assert_same(traced, module, images(4))


def test_fx_of_a_head_alone_is_refused_in_a_sentence():
    with pytest.raises(TypeError, match="torch.fx cannot trace into FusedInterflowHead, which is one operator; trace the network that holds it"):
        torch.fx.symbolic_trace(FusedInterflowHead((4,), CLASSES))


# --- ONNX --------------------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])
@pytest.mark.parametrize("kind", ["gated", "folded"])
def test_onnx(kind, dynamo, tmp_path):
    """Exported as the plain PyTorch definition, dynamic batch; ONNX Runtime gives the same values."""
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="what was exported is run by ONNX Runtime")
    module, file = network(kind).eval(), tmp_path / "network.onnx"
    dynamic = {"dynamic_shapes": ({0: torch.export.Dim.DYNAMIC},)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(module, (images(2),), file, dynamo=dynamo, input_names=["x"], verbose=False, **dynamic)
    y = runtime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": images(5).numpy()})[0]
    assert_close("y", torch.from_numpy(y), module(images(5)), 1e-5)


# --- mappings ----------------------------------------------------------------------------------------------------------------
def test_features_may_be_any_mapping():
    from collections import OrderedDict
    from types import MappingProxyType

    head = FusedInterflowHead((4, 8), CLASSES)
    maps = [torch.randn(2, 4, 5, 6), torch.randn(2, 8, 3, 3)]
    for kind in (dict, OrderedDict, MappingProxyType):
        named = kind({"z": maps[0], "a": maps[1]})  # in its order, not by name
        for f in (head, head.to_eager(), head.fold()):
            assert torch.equal(f(named), f(maps))
        assert torch.equal(head.forward_branches(named)[1], head.forward_branches(maps)[1])
        assert torch.equal(interflow_head(named, head.weight, head.bias, head.attention_weight), head(maps))
    with pytest.raises(TypeError, match="features must be a list, a tuple or a mapping of tensors, one for each stage, got set"):
        head(set(maps))
