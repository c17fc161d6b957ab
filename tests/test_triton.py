"""Triton's kernels under its interpreter in a process of its own, and when and why they serve."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from interflow_kernels import backend, stage_tap
from interflow_kernels.triton import registration

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")


def python(code, **environment):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("stem", "tests"), [("head", 50), ("accuracy", 50), ("tap", 50), ("end", 40), ("tiles", 20), ("pool", 20)])
def test_kernels_under_the_interpreter(stem, tests):
    arguments = ["-m", "pytest", "-q", "-W", "ignore", "-p", "no:cacheprovider", str(HERE / f"triton_kernels/test_triton_{stem}.py")]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= tests, done.stdout


def test_schemas_are_those_of_the_compiled_library():
    for text in registration.SCHEMAS:
        name = text.split("(")[0]
        compiled = getattr(torch.ops.interflow_kernels, name).default._schema
        assert torch._C.parse_schema(f"interflow_kernels::{text}") == compiled


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import interflow_kernels, torch; print(interflow_kernels.stage_tap(torch.ones(1, 1, 2, 2))[1].item())"
    assert python(code) == ["1.0"]
    assert python("import sys, interflow_kernels; print('triton' in sys.modules)") == ["False"]


def test_asked_for_on_a_device_that_it_does_not_serve():
    for device in ("cpu", "mps"):
        assert registration.reason_against(device) is not None
    with backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for but cannot run on device 'cpu': Triton serves GPUs"):
        stage_tap(torch.ones(1, 1, 2, 2))
    assert stage_tap(torch.ones(1, 1, 2, 2))[1].item() == 1


REASON = """
from interflow_kernels import _backend
from interflow_kernels.triton import registration
print(registration.reason_against("cuda"))
print(_backend.reason_against("triton", "cuda"))
"""


def test_what_is_missing_is_named_with_its_remedy(tmp_path):
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)\n"
    assert set(python(hidden + REASON)) == {"Triton is not installed; pip install triton"}
    if importlib.util.find_spec("triton") is None:
        return
    no_compiler = {"PATH": str(tmp_path)}
    environment = {name: value for name, value in os.environ.items() if name != "CC"} | no_compiler
    done = subprocess.run([sys.executable, "-c", REASON], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("Triton needs a C compiler to launch its kernels and finds none; install gcc"), done.stderr
    assert python(REASON, CC="gcc", **no_compiler) == ["None", "None"]


@needs_triton
def test_a_raw_call_is_refused_where_something_is_missing():
    code = """
import torch, interflow_kernels
from interflow_kernels.triton import registration
registration.REASONS["cuda"] = "no compiler; install one"
class OnGpu:
    device = torch.device("cuda", 0)
try:
    registration.stage_tap(OnGpu(), None, True, True)
except RuntimeError as error:
    print(error)
"""
    assert python(code) == ["the Triton kernels cannot run on device 'cuda': no compiler; install one"]


SERVED = """
import torch, interflow_kernels, sys
from interflow_kernels import _backend, backend, stage_tap
from interflow_kernels.triton import registration
def served():
    from interflow_kernels.triton.common.launch import noted
    with noted(launching=False) as launches:
        stage_tap(torch.ones(1, 1, 2, 2))
    return bool(launches)
"""


@needs_triton
def test_on_request_triton_stands_in_front_of_the_compiled_kernels():
    code = f"""{SERVED}
print(served())
with backend("triton"):
    print(served())
    with backend("native"):
        print(served())
    with backend("triton"):
        print(served())
    print(served())
print(served())
"""
    assert python(code, TRITON_INTERPRET="1") == ["False", "True", "False", "True", "True", "False"]
    assert python(f"{SERVED}\nprint(served())\nwith backend('native'):\n    print(served())", TRITON_INTERPRET="1", INTERFLOW_BACKEND="triton") == [
        "True",
        "False",
    ]


@needs_triton
def test_a_gpu_that_the_library_has_no_code_for_leaves_the_others_to_it():
    """Played on the CPU: the automatic choice finds the compiled kernels unfit for it, then fit again as another GPU would be."""
    code = f"""{SERVED}
from interflow_kernels import _native
u = torch.randn(2, 3, 4, 5)
native = stage_tap(u)
_native.cpu_error = "no code for this one"
registration.native_serves = lambda device: True
print(served(), served(), len(registration._routed), torch.equal(stage_tap(u)[0], native[0]))
leaf = u.clone().requires_grad_()
stage_tap(leaf)[1].sum().backward()
_native.cpu_error = None
registration._without_code.clear()
print(served(), [torch.equal(a, b) for a, b in zip(stage_tap(u), native)])
with backend("triton"):
    print(served())
print(served(), leaf.grad.shape == u.shape)
"""
    assert python(code, TRITON_INTERPRET="1") == ["True True 1 True", "False [True, True]", "True", "False True"]


@needs_triton
def test_a_gpu_that_the_library_has_no_code_for_is_served_in_compiled_code_too():
    """Played on the CPU as above; no call outside torch.compile goes before, which would have arranged it."""
    code = f"""{SERVED}
from interflow_kernels import _native
_native.cpu_error = "no code for this one"
registration.native_serves = lambda device: True
stage_tap = torch.compile(stage_tap, backend="eager", fullgraph=True)
print(served(), served())
"""
    assert python(code, TRITON_INTERPRET="1") == ["True True"]


@needs_triton
def test_without_a_compiled_library_the_operators_exist_for_triton():
    code = f"""{SERVED}
print(registration.schemas_exist(), served(), torch.ops.interflow_kernels.stage_tap.default._schema.name)
u = torch.randn(2, 3, 4, 5, requires_grad=True)
m, p = stage_tap(u)
m.sum().backward()
print(u.grad.shape, torch.compile(lambda u: stage_tap(u)[1], backend="aot_eager", fullgraph=True)(u.detach()).equal(p))
"""
    # _native is what loads the library, so it is kept from finding it
    blocked = "import torch; torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError('hidden'))\n"
    assert python(blocked + code, TRITON_INTERPRET="1") == ["True True interflow_kernels::stage_tap", "torch.Size([2, 3, 4, 5]) True"]
    plain = """
import torch, interflow_kernels
from interflow_kernels.triton import registration
print(registration.schemas_exist(), interflow_kernels.stage_tap(torch.ones(1, 1, 2, 2))[1].item())
"""
    hidden = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'triton' else f(n, *a)\n"
    assert python(blocked + hidden + plain) == ["False 1.0"]


def test_the_report_says_why_triton_does_not_serve():
    from interflow_kernels.info import report

    assert "triton: Triton serves GPUs" in report()
