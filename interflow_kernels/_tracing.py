"""Who records the call: a compiler, an exporter, a tracer or nobody. It decides by which route an operator is reached."""

import torch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

EAGER = ""
"""Nobody records: the public Function, or the operator alone where no graph is built."""
COMPILED = "compiled"
"""Dynamo traces for torch.compile: the public Function, which keeps stride-0 gradients, autocast and whole graphs."""
OPERATOR = "operator"
"""torch.export and torch.jit.trace: the operator itself. It differentiates by its own registration, is saved and loaded by name."""
PLAIN = "plain"
"""The reference in plain PyTorch operators, where the operator cannot follow: torch.func in a compiled graph."""
ONNX = "onnx"
"""Either of torch's exporters to ONNX: operators that ONNX has, see _onnx.py."""
FORWARD_MODE = "forward mode"
"""Dynamo traces a jvp, jacfwd or hessian: refused, as uncompiled. In plain operators Inductor (2.13) reads its zero tangents from address 0."""


def _route_while_compiling() -> str:
    # Dynamo loses the gradient of an autograd.Function below a torch.func transform (zeros), and its batching rule.
    if torch._C._are_functorch_transforms_active():
        transforms = retrieve_all_functorch_interpreters()
        return FORWARD_MODE if any(each.key() == TransformType.Jvp for each in transforms) else PLAIN
    if torch.onnx.is_in_onnx_export():
        return ONNX
    return OPERATOR if torch.compiler._is_exporting_flag else COMPILED


# What torch.compiler.assume_constant_result does, without its import of torch._dynamo: called while Dynamo traces, it tells what
# holds there. Dynamo has entered the transforms that it traces; torch.compiler.is_exporting is always true under older versions.
_route_while_compiling._dynamo_marked_constant = True  # type: ignore[attr-defined]


def route() -> str:
    """EAGER, COMPILED, OPERATOR, PLAIN, ONNX or FORWARD_MODE. Asked while Dynamo traces, it guards on an open dual level (torch.autograd.forward_ad)."""
    if torch.compiler.is_compiling():
        found = _route_while_compiling()
        return PLAIN if found == COMPILED and forward_ad._current_level >= 0 else found
    if torch._C._get_tracing_state() is not None:
        return ONNX if torch.onnx.is_in_onnx_export() else OPERATOR
    return EAGER


def no_script(module: torch.nn.Module) -> torch.nn.Module:
    """As `__prepare_scriptable__` of a module: what torch.jit.script calls before it compiles."""
    raise NotImplementedError(f"torch.jit.script cannot compile {type(module).__name__}; use torch.jit.trace or torch.export.export")
