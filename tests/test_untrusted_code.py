"""No line of the package reads a file by means that could execute what is in it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = [path for folder in ("interflow_kernels", "python", "examples", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
EXECUTING = {"eval", "exec", "compile", "__import__"}
"""Of Python's own functions."""
PICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
"""Modules whose loaders call what a file names."""
ALLOWED = {
    "python/interflow_vision/data/cifar.py": {"import pickle"},  # an Unpickler that refuses every name but those of arrays of bytes
    # What a person exports and then names as a program to be run: these formats are programs.
    "python/interflow_vision/serving/formats.py": {"torch.jit.load"},
}


def dotted(node: ast.expr) -> str:
    """The name of an expression such as torch.load, as text; "" where it is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def value(call: ast.Call, keyword: str):
    """The constant given for a keyword; None where there is none."""
    return next((given.value.value for given in call.keywords if given.arg == keyword and isinstance(given.value, ast.Constant)), None)


def forbidden(text: str) -> list[str]:
    """What a source does that could execute a file's content, each with its line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [(f"import {name}", node.lineno) for name in names if name.partition(".")[0] in PICKLING]
            if isinstance(node, ast.ImportFrom):  # under another name a call would not be seen
                hidden = {("torch", "load"), ("torch.jit", "load"), ("torch.hub", "load"), ("numpy", "load"), ("yaml", "load"), ("yaml", "unsafe_load")}
                found += [(f"from {node.module} import {each.name}", node.lineno) for each in node.names if (node.module, each.name) in hidden]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        first, _, last = name.rpartition(".")
        wrong = (
            name in EXECUTING
            or (name == "torch.load" and value(node, "weights_only") is not True)
            or (first == "yaml" and "load" in last and last != "safe_load")
            or (name in ("np.load", "numpy.load") and value(node, "allow_pickle") is True)
            or name in ("torch.jit.load", "torch.hub.load", "os.system", "os.popen", "runpy.run_path")
            or value(node, "weights_only") is False
            or value(node, "allow_pickle") is True
            or value(node, "trust_remote_code") is True
            or value(node, "shell") is True
        )
        found += [(name or ast.unparse(node.func), node.lineno)] if wrong else []
    return found


def test_no_file_is_read_by_executing_it():
    assert len(SHIPPED) > 100
    found = []
    for path in SHIPPED:
        name = str(path.relative_to(ROOT))
        found += [f"{name}:{line}: {what}" for what, line in forbidden(path.read_text()) if what not in ALLOWED.get(name, set())]
    assert not found, found


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=given)",
        "from torch import load",
        "model.load_from_checkpoint(path, weights_only=False)",
        "yaml.load(text, yaml.Loader)",
        "yaml.unsafe_load(text)",
        "from yaml import unsafe_load",
        "import pickle",
        "from joblib import load",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "datasets.load_dataset(name, trust_remote_code=True)",
        "torch.hub.load(repository, name)",
    ],
)
def test_what_would_execute_a_file_is_seen(line):
    assert forbidden(line)


@pytest.mark.parametrize("line", ["torch.load(path, map_location='cpu', weights_only=True)", "yaml.safe_load(text)", "np.load(path)", "model.eval()"])
def test_what_reads_plain_values_is_allowed(line):
    assert not forbidden(line)
