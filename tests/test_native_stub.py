"""The type stub of the compiled module _C names what the module holds, and nothing else."""

import ast
import re
from pathlib import Path

import pytest

import interflow_kernels

_C = pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")
STUB = ast.parse(Path(interflow_kernels.__file__).with_name("_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
FUNCTIONS = {node.name: node for node in STUB.body if isinstance(node, ast.FunctionDef)}


def public(holder):
    return {name for name in vars(holder) if not name.startswith("_")}


def declared(function, builtin):
    """(names of parameters, annotation of the result) in the stub, and what pybind11 wrote of the same into the docstring."""
    parameters = [a.arg for a in (*function.args.posonlyargs, *function.args.args)]
    of_module = re.match(r"\w+\((.*)\) -> (.+)", builtin.__doc__)
    return parameters, ast.unparse(function.returns), re.findall(r"(\w+): ", of_module[1]), of_module[2].replace("interflow_kernels._C.", "")


def test_every_name_is_declared():
    assert public(_C) == set(CLASSES) | set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_their_parameters_and_results(name):
    parameters, result, real_parameters, real_result = declared(FUNCTIONS[name], getattr(_C, name))
    assert parameters == real_parameters
    assert result == real_result or real_result == "dict"


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_their_properties_and_methods(name):
    members = {node.name: node for node in CLASSES[name].body if isinstance(node, ast.FunctionDef)}
    real = getattr(_C, name)
    assert set(members) == public(real)
    for member, node in members.items():
        if isinstance(getattr(real, member), property):
            assert [ast.unparse(d) for d in node.decorator_list] == ["property"], member
            text = getattr(real, member).fget.__doc__ or ""
            if " -> " in text:
                assert ast.unparse(node.returns) == text.strip().split(" -> ")[1].replace("interflow_kernels._C.", ""), member
        else:
            parameters, result, real_parameters, real_result = declared(node, getattr(real, member))
            assert len(parameters) == len(real_parameters) and result == real_result, member
            assert node.args.posonlyargs, f"{member}: pybind11 does not name its arguments"
