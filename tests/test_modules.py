"""The modules: swapping, copying, starting values, folding, the comparison heads, backends, import."""

import copy
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import interflow_kernels
from interflow_kernels import AuxiliaryHeads, FusedInterflowHead, InterflowHead, backend
from interflow_kernels.testing import ATTENTIONS, HeadCase, assert_close, head_inputs

LINEAR = [a for a in ATTENTIONS if a != "gated"]
CASE = HeadCase(maps=((4, 6, 5), (8, 3, 3)), classes=5)


def both(attention, **more):
    case = HeadCase(**{**vars(CASE), "attention": attention, **more})
    plain = case.head()
    return plain, FusedInterflowHead.from_eager(plain), head_inputs(case)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_state_dict_swaps_both_ways(attention):
    plain, _, maps = both(attention)
    arguments = plain._config()
    fused = FusedInterflowHead(**arguments)
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    assert_close("fused", fused(maps), plain(maps))
    again = InterflowHead(**arguments)
    again.load_state_dict(fused.state_dict())
    assert torch.equal(again(maps), plain(maps))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_conversion_shares_parameters(attention):
    plain, fused, maps = both(attention)
    back = fused.eval().to_eager()
    assert type(back) is InterflowHead
    assert not back.training
    for name, tensor in plain.state_dict(keep_vars=True).items():
        assert fused.state_dict(keep_vars=True)[name] is tensor
        assert back.state_dict(keep_vars=True)[name] is tensor
    assert torch.equal(back(maps), plain(maps))


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("kind", [InterflowHead, FusedInterflowHead])
def test_copies(kind, attention, tmp_path):
    head = kind((4, 8), 5, attention, hard_weights=(0.3, -2.0) if attention == "hard" else None)
    maps = head_inputs(CASE)
    torch.save(head, tmp_path / "head.pt")
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(tmp_path / "head.pt", weights_only=False)):
        assert type(other) is kind
        assert torch.equal(other(maps), head(maps))
        assert other.weight is not head.weight


def test_representation():
    text = repr(FusedInterflowHead((4, 8), 5, "gated", pool_size=(2, 3), layout=("NHWC", "NCHW")))
    for part in ("in_channels=(4, 8)", "num_classes=5", "'gated'", "pool_size=(2, 3)", "weight=[5, 72]", "bias=[2, 5]", "attention_weight=[2, 2]", "NHWC"):
        assert part in text
    assert "\n" not in text


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_device_and_dtype(attention):
    head = FusedInterflowHead((4, 8), 5, attention, device="meta", dtype=torch.float64)
    assert {t.dtype for t in head.state_dict().values()} == {torch.float64}
    assert {t.device.type for t in head.state_dict().values()} == {"meta"}
    head = head.to_empty(device="cpu")
    head.reset_parameters()
    maps = [x.double() for x in head_inputs(CASE)]
    y, z = head.forward_branches(maps)
    assert_close("mean of the branches", y, z.mean(1))
    assert head.bfloat16()([x.bfloat16() for x in maps]).dtype == torch.bfloat16


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_starting_values(attention):
    head = FusedInterflowHead((100, 400), 50, attention, attention_bias=attention != "hard")
    for i, width in enumerate((100, 400)):
        for values in (head.branch_weight(i), head.bias[i]):
            assert values.abs().max() <= width**-0.5
        reference = torch.nn.Linear(width, 50)
        assert abs(float(head.branch_weight(i).detach().std() / reference.weight.detach().std()) - 1) < 0.1
    assert head.branch_weight(1).data_ptr() == head.weight[:, 100:].data_ptr()
    assert head.branch_weight(-1).shape == (50, 400)
    with pytest.raises(IndexError, match="2 stages"):
        head.branch_weight(2)
    y, z = head.forward_branches([torch.randn(3, 100, 2, 2), torch.randn(3, 400, 2, 2)])
    assert_close("mean", y, z.mean(1))


@pytest.mark.parametrize("attention", LINEAR)
def test_stage_weights_rebuild_the_logits(attention):
    _, head, maps = both(attention, attention_bias=False)
    y, z = head.forward_branches(maps)
    weights = head.stage_weights()
    assert weights.shape == (2, 5)
    assert not weights.requires_grad
    assert_close("y", (weights * z).sum(1), y)


def test_stage_weights_of_gates():
    _, head, maps = both("gated")
    y, z = head.forward_branches(maps)
    weights = head.stage_weights(maps)
    assert weights.shape == z.shape
    assert_close("y", (weights * z).sum(1), y)
    with pytest.raises(ValueError, match="features must be given"):
        head.stage_weights()


@pytest.mark.parametrize("pool_size", [1, (2, 2)])
@pytest.mark.parametrize("attention", LINEAR)
def test_fold(attention, pool_size):
    plain, head, maps = both(attention, pool_size=(pool_size, pool_size) if isinstance(pool_size, int) else pool_size)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    for source in (plain, head):
        folded = source.fold()
        assert_close("folded", folded(maps), source(maps))
        assert not list(folded.parameters())
        assert folded.fused is (source is head)
        leaves = [x.requires_grad_() for x in maps]
        for i, (got, want) in enumerate(zip(*(torch.autograd.grad(f(leaves).sum(), leaves) for f in (folded, source)), strict=True)):
            assert_close(f"features[{i}]", got, want, 1e-5)
        assert torch.equal(pickle.loads(pickle.dumps(folded))(maps), folded(maps))
    assert all(torch.equal(v, before[k]) for k, v in head.state_dict().items())
    assert sorted(folded.state_dict()) == ["bias", "weight"]


def test_gates_do_not_fold():
    with pytest.raises(ValueError, match="gated"):
        FusedInterflowHead((4, 8), 5, "gated").fold()


def test_auxiliary_heads():
    heads, maps = AuxiliaryHeads((4, 8), 5, weight=0.3), head_inputs(CASE)
    scores = [F.linear(x.mean((2, 3)), c.weight, c.bias) for x, c in zip(maps, heads.classifiers, strict=True)]
    branches = heads.train()(maps)
    assert_close("branches", branches, torch.stack(scores, 1))
    target = torch.tensor([0, 4, 2])
    expected = F.cross_entropy(scores[1], target) + 0.3 * F.cross_entropy(scores[0], target)
    assert_close("loss", heads.loss(branches, target), expected)
    assert_close("eval", heads.eval()(maps), scores[1])
    last, branches = heads.forward_branches(maps)
    assert torch.equal(last, branches[:, -1])


def test_nhwc_layouts():
    plain, _, maps = both("nxn")
    moved = [x.permute(0, 2, 3, 1) for x in maps]
    for kind in (InterflowHead, FusedInterflowHead):
        for layout, given in (("NHWC", moved), (("NCHW", "NHWC"), [maps[0], moved[1]]), ("NHWC", [moved[0], moved[1].flatten(1, 2)])):
            head = kind(**{**plain._config(), "layout": layout})
            head.load_state_dict(plain.state_dict())
            assert_close(str(layout), head(given), plain(maps))


# --- backends ---------------------------------------------------------------------------------------------------------
def calls(head, maps):
    with torch.profiler.profile() as profile:
        head(maps)
    return any(event.name.startswith("interflow_kernels::") for event in profile.events())


def test_backend_choice():
    _, head, maps = both("nxn")
    assert calls(head, maps)
    with backend("eager"):
        assert not calls(head, maps)
        with backend("native"):
            assert calls(head, maps)
        assert not calls(head, maps)
    with backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for but cannot run on device 'cpu': "):
        head(maps)
    with pytest.raises(ValueError, match=r"'auto', 'native', 'triton', 'eager', got 'cuda13'"), backend("cuda13"):
        pass
    assert calls(head, maps)


def test_backend_is_guarded_under_compile():
    torch._dynamo.reset()
    _, head, maps = both("nxn")
    graphs = []
    compiled = torch.compile(head, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for name, fused in (("auto", True), ("eager", False), ("auto", True)):
        with backend(name):
            compiled(maps)
        code = graphs[-1 if name == "eager" else 0].code
        assert ("interflow" in code or "autograd" in code.lower()) is fused
    assert len(graphs) == 2


def run(code, folder=None, **environment):
    path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    alone = {"INTERFLOW_LIBRARIES": ""} if folder else {}  # a copy of the package has the libraries that lie in it
    done = subprocess.run(
        [sys.executable, *code], capture_output=True, text=True, env={**os.environ, **alone, "PYTHONPATH": path, **environment}, cwd=folder or os.getcwd()
    )
    return done


def test_backend_from_the_environment():
    show = ["-c", "import interflow_kernels._backend as b; print(b.select('cpu'))"]
    assert run(show, INTERFLOW_BACKEND="eager").stdout.strip() == "eager"
    assert run(show).stdout.strip() == "native"
    wrong = run(show, INTERFLOW_BACKEND="fast")
    assert wrong.returncode != 0
    assert "INTERFLOW_BACKEND must be one of" in wrong.stderr


def test_import_is_light():
    code = "import sys, interflow_kernels; print([m for m in ('triton', 'lightning', 'matplotlib', 'sklearn', 'torchvision') if m in sys.modules])"
    assert run(["-c", code]).stdout.strip() == "[]"


WITHOUT = """
import sys
for name in ("numpy", "triton", "lightning", "torchvision", "matplotlib", "sklearn"):
    sys.modules[name] = None  # an import of it raises
import torch, interflow_kernels
head = interflow_kernels.FusedInterflowHead((4,), 5)
head([torch.ones(2, 4, 3, 3)]).sum().backward()
print(head.fold()([torch.ones(2, 4, 3, 3)]).shape)
"""


def test_runs_without_any_optional_package():
    done = run(["-c", WITHOUT])
    assert done.stdout.strip() == "torch.Size([2, 5])", done.stderr


USE = """
import warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import interflow_kernels as ik
    head = ik.FusedInterflowHead((4,), 5)
    y = [head([torch.randn(2, 4, 3, 3)]) for _ in range(3)][0]
    y.sum().backward()
ours = [str(w.message) for w in caught if "interflow" in str(w.message)]
assert len(ours) == 1, ours
print(ours[0])
"""


@pytest.mark.parametrize("broken", [False, True], ids=["missing", "broken"])
def test_without_the_compiled_library(tmp_path, broken):
    source = Path(interflow_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "interflow_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if broken:
        (tmp_path / "interflow_kernels" / "_cpu.abi3.so").write_bytes(b"not a library")
    done = run(["-c", USE], str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "plain PyTorch on device 'cpu'" in done.stdout
    assert ("does not load" if broken else "is missing") in done.stdout
    assert "pip install" in done.stdout
    forced = run(
        ["-c", "import torch, interflow_kernels as k; k.FusedInterflowHead((4,), 5)([torch.randn(1, 4, 2, 2)])"], str(tmp_path), INTERFLOW_BACKEND="native"
    )
    assert forced.returncode != 0
    assert "backend 'native' was asked for but cannot run" in forced.stderr
    info = run(["-m", "interflow_kernels.info"], str(tmp_path))
    assert "cpu   runs     eager" in info.stdout


def test_info():
    done = run(["-m", "interflow_kernels.info"])
    assert done.returncode == 0, done.stderr
    for part in (torch.__version__, interflow_kernels.__version__, "cpu   runs     native", "stable ABI 2.10", "CPU kernels"):
        assert part in done.stdout
