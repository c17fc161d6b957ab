"""torch.onnx.export(dynamo=True) of every operator, without any argument for it: plain ONNX operators, any batch and image size, ONNX Runtime's numbers."""

import pytest
import torch
from torch import nn
from torch.export import Dim

from interflow_kernels import FusedInterflowHead, StageTap, conv_tap, interflow_head, stage_end, stage_tap
from interflow_kernels.testing import ATTENTIONS, assert_close

pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript (pip install 'interflow-kernels[serve]')")
onnxruntime = pytest.importorskip("onnxruntime", reason="what was exported is run by ONNX Runtime (pip install 'interflow-kernels[serve]')")
pytestmark = pytest.mark.filterwarnings("ignore")

CLASSES = 3


class Heads(nn.Module):
    """Every attention mode, fused and folded, on maps in NCHW and NHWC, tokens and pooled features, with one bin and with 2 x 3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        made = [FusedInterflowHead((4, 5), CLASSES, attention, attention_bias=attention != "hard") for attention in ATTENTIONS]
        made += [head.fold() for head in made if head.attention != "gated"]
        windows = [FusedInterflowHead((4, 5), CLASSES, attention, pool_size=(2, 3)) for attention in ("nxn", "gated")]
        self.heads, self.windows = nn.ModuleList(made), nn.ModuleList([*windows, windows[0].fold()])
        self.nhwc = FusedInterflowHead((4, 5), CLASSES, "classwise", layout=("NHWC", "NHWC"), bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))

    def forward(self, x, z):
        scores = [head([x, z]) for head in [*self.heads, *self.windows]]
        mixed = [head([x.mean((2, 3)), z]) for head in self.heads[:1]]
        nhwc = [self.nhwc([x.permute(0, 2, 3, 1), z.flatten(2).transpose(1, 2)])]
        branches = [t.flatten(1) for head in self.heads[3:5] for t in head.forward_branches([x, z])]
        head = self.heads[1]
        function = [interflow_head({"x": x, "z": z}, head.weight, head.bias, head.attention_weight, attention="1xn")]
        return [*scores, *mixed, *nhwc, *branches, *function]


class Taps(nn.Module):
    """Both forms, with and without a shift, behind a convolution that leaves its bias to the tap."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.tap = nn.Conv2d(4, 5, 3, padding=1), StageTap()

    def forward(self, x, z):
        m, p = conv_tap(self.conv, self.tap, x)
        return [m, p, *stage_tap(z), stage_tap(z, self.conv.bias, max_pool=False)[1], stage_tap(m)[1]]


class Ends(nn.Module):
    """The stage end with and without each of its arguments, and heads whose means go through a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 5, 3, padding=1)
        self.heads = nn.ModuleList(FusedInterflowHead((4, 5), CLASSES, attention, norm="batch") for attention in ("nxn", "gated")).eval()

    def forward(self, x, z):
        u = self.conv(x)
        v, p = stage_end(u, self.conv.bias, u * 0.5)
        return [v, p, *stage_end(z, activation="none"), *stage_end(z), *(head([x, z]) for head in self.heads)]


def inputs(batch, side, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, side, side + 3, generator=generator), torch.randn(batch, 5, side - 2, side - 1, generator=generator)


def dynamic():
    """Batch and both sides of both inputs."""
    batch = Dim("batch", min=1, max=64)
    sides = [{0: batch, 2: Dim(f"rows{i}", min=least, max=512), 3: Dim(f"columns{i}", min=least, max=512)} for i, least in enumerate((8, 4))]
    return tuple(sides)


def exported(what, **options):
    return torch.onnx.export(what, inputs(2, 9) if isinstance(what, nn.Module) else (), dynamo=True, verbose=False, **options)


def compare(program, module):
    """Only operators of ONNX itself; values of every output for other batches and sizes."""
    assert {node.domain for node in program.model.graph} <= {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    for batch, side in ((1, 8), (2, 9), (5, 16)):
        given = inputs(batch, side, seed=side)
        found = session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        expected = module(*given)
        assert len(found) == len(expected)
        for i, (got, want) in enumerate(zip(found, expected, strict=True)):
            assert got.shape == tuple(want.shape), (i, got.shape, want.shape)
            assert_close(f"output {i}, B = {batch}", torch.from_numpy(got), want.detach(), 1e-5)


@pytest.mark.parametrize("kind", [pytest.param(Heads, marks=pytest.mark.slow), Taps, Ends])
def test_modules_of_any_batch_and_size(kind):
    module = kind().eval()
    compare(exported(module, dynamic_shapes=dynamic()), module)


@pytest.mark.parametrize("kind", [pytest.param(Heads, marks=pytest.mark.slow), Taps, Ends])
def test_programs_with_our_operators_in_them(kind):
    """What torch.export.export recorded, with gradients on: each of our operators becomes ONNX operators as it is exported."""
    module = kind().eval()
    program = torch.export.export(module, inputs(2, 9), dynamic_shapes=dynamic())
    assert any("interflow_kernels" in str(node.target) for node in program.graph.nodes)
    compare(exported(program), module)


class Few(Heads):
    """Two of them: in each run of the tests."""

    def forward(self, x, z):
        return [self.heads[2]([x, z]), self.heads[7]([x, z]), *self.windows[1].forward_branches([x, z])]


def test_a_module_of_few_heads():
    module = Few().eval()
    compare(exported(module, dynamic_shapes=dynamic()), module)


class Windows(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = FusedInterflowHead((4,), CLASSES, "1xn", pool_size=(3, 2)).eval()

    def forward(self, x, z):
        return [self.head([x])]


def test_windows_of_a_known_size():
    """Adaptive windows that overlap (9 rows in 3, 12 columns in 2; 7 in 3): as slices, exact for NaN and infinities too."""
    module = Windows()
    program = exported(module)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x, _ = inputs(2, 9)
    x[0, 0, 0, 0], x[1, 1, 8, 11] = float("inf"), float("nan")
    z = inputs(2, 9)[1]
    (found,) = session.run(None, {each.name: t.numpy() for each, t in zip(session.get_inputs(), (x, z), strict=True)})
    expected = module(x, z)[0].detach()
    assert torch.equal(torch.from_numpy(found).isfinite(), expected.isfinite()) and not expected.isfinite().all()


def test_half_precision_sums_in_fp32():
    """A bf16 network: what the kernels keep in fp32, means and products, stays in fp32 in ONNX too."""
    head = FusedInterflowHead((4, 5), CLASSES, "nxn", dtype=torch.bfloat16).eval()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, x, z):
            return self.head([x.bfloat16(), z.bfloat16()]).float()

    program = exported(Network())
    types = {
        output.dtype.name for node in program.model.graph for output in node.outputs if node.op_type in ("ReduceMean", "Gemm") and output.dtype is not None
    }
    assert types == {"FLOAT"}
