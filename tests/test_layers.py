"""Imports run downwards, and never in a circle: in interflow_kernels, interflow_vision and the benchmarks."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the lowest layer up; between the units of one layer there are no imports. A unit is a module, or a package with all that is in it
# and no unit of its own. A package's __init__ is "package.__init__" where its parts have layers of their own.
LAYERS = (
    # interflow_kernels: what needs nothing of this package
    ("interflow_kernels._C", "interflow_kernels._version", "interflow_kernels._namespace", "interflow_kernels._on_import", "interflow_kernels.reference"),
    ("interflow_kernels._native", "interflow_kernels._tap_format", "interflow_kernels._tracing", "interflow_kernels._fx", "interflow_kernels._onnx"),
    # the Triton kernels, and where they are registered
    ("interflow_kernels.triton.__init__", "interflow_kernels.triton.common", "interflow_kernels.triton.tiles"),
    ("interflow_kernels.triton.interflow_head", "interflow_kernels.triton.stage_end", "interflow_kernels.triton.stage_tap"),
    ("interflow_kernels.triton.registration",),
    # checks of arguments, the choice of a backend, the operators, and what is built of them
    ("interflow_kernels._options",),
    ("interflow_kernels._validate", "interflow_kernels._backend"),
    ("interflow_kernels.ops",),
    ("interflow_kernels.functional",),
    ("interflow_kernels.modules",),
    ("interflow_kernels.__init__",),
    # programs, and what tests of users take
    ("interflow_kernels.info", "interflow_kernels.testing"),
    ("interflow_kernels.triton.tune",),
    # interflow_vision
    ("interflow_vision.errors",),
    ("interflow_vision.processes",),
    ("interflow_vision.models", "interflow_vision.data"),
    ("interflow_vision.backbones",),
    ("interflow_vision.reports", "interflow_vision.serving"),
    ("interflow_vision.training",),
    ("interflow_vision.compare",),
    ("interflow_vision.__init__",),
    ("interflow_vision.cli",),
    ("interflow_vision.__main__",),
    # bench: the harness, what is measured and how pages are made, benchmarks, programs
    ("harness",),
    ("networks", "pages", "gpu_model"),
    ("bench_backbones", "bench_complexity", "bench_head", "bench_stage_end", "bench_stage_tap", "bench_train_step", "conftest"),
    ("bench_triton", "gpu"),
    ("branch_cost", "profile_networks", "triton_host_time", "serving", "hub", "numerics"),
)
# Folders whose modules are searched, each with the name its modules have in front.
TREES = ((ROOT / "interflow_kernels", "interflow_kernels"), (ROOT / "python/interflow_vision", "interflow_vision"), (ROOT / "bench", ""))


def modules(trees):
    """Every module of the trees by its full name, stubs of compiled ones among them; a package by its __init__ as "package.__init__"."""
    found = {}
    for folder, prefix in trees:
        for path in sorted((*folder.rglob("*.py"), *folder.rglob("*.pyi"))):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((prefix, *parts) if prefix else parts)] = path
    return found


def imports(name, path, known):
    """(module, line) of every import in a module of ours of another of ours, those inside functions among them.

    `from package import x` is an import of package.x where that is a module, else of the package's __init__.
    """
    parents = name.split(".")[:-1]

    def module(full):
        return next((each for each in (full, f"{full}.__init__") if each in known), None)

    for node in ast.walk(ast.parse(path.read_text())):
        targets = []
        if isinstance(node, ast.Import):
            targets = [module(alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - (node.level - 1)] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            targets = [module(f"{base}.{alias.name}") or module(base) for alias in node.names]
        yield from ((target, node.lineno) for target in targets if target is not None and target != name)


def graph(trees):
    known = modules(trees)
    return {name: sorted(set(imports(name, path, known))) for name, path in known.items()}


def unit_of(name, ranks):
    """The longest unit that a module is or lies in; None where there is none."""
    words = name.split(".")
    candidates = (".".join(words[:n]) for n in range(len(words), 0, -1))
    return next((each for each in candidates if each in ranks), None)


def upward(edges, layers):
    """A sentence for each module without a layer, each import that does not run down, and each unit that no module is in."""
    ranks = {unit: rank for rank, units in enumerate(layers) for unit in units}
    units = {name: unit_of(name, ranks) for name in edges}
    for name, unit in units.items():
        if unit is None:
            yield f"{name} has no layer: name it in LAYERS"
    for name, targets in edges.items():
        for target, line in targets:
            ours, theirs = units[name], units[target]
            if ours != theirs and None not in (ours, theirs) and ranks[theirs] >= ranks[ours]:
                yield f"{name}, line {line}, imports {target}, which is not below it"
    yield from (f"LAYERS names {unit}, which does not exist" for unit in sorted(set(ranks) - set(units.values())))


def circle(edges):
    """Modules that import each other in a ring, the first again at the end; [] where there is none."""
    done, road = set(), []

    def visit(name):
        if name in road:
            return [*road[road.index(name) :], name]
        if name in done:
            return []
        road.append(name)
        found = next(filter(None, (visit(target) for target, _ in edges[name])), [])
        road.pop()
        done.add(name)
        return found

    return next(filter(None, map(visit, edges)), [])


def test_imports_run_downwards():
    assert list(upward(graph(TREES), LAYERS)) == []


def test_there_is_no_circle():
    assert circle(graph(TREES)) == []


def test_the_search_finds_imports():
    """It reads the real trees, and what it finds there is there."""
    edges = {name: {target for target, _ in targets} for name, targets in graph(TREES).items()}
    assert {"interflow_kernels._C", "interflow_kernels._namespace"} == edges["interflow_kernels._native"]
    assert {"interflow_kernels._native", "interflow_kernels._namespace"} == edges["interflow_kernels.triton.registration"]
    assert {"interflow_kernels.ops.__init__", "interflow_kernels._backend", "interflow_kernels._validate"} <= edges["interflow_kernels.functional"]
    assert "interflow_vision.reports.curves" in edges["interflow_vision.training.runs"]
    assert {"harness.stats", "interflow_kernels._backend"} <= set().union(*(edges[name] for name in edges if name.startswith("harness.")))


# --- made-up trees ----------------------------------------------------------------------------------------------------------
MADE_UP = {
    "__init__": "from .high import answer",
    "low": "import math",
    "middle/__init__": "",
    "middle/one": "from .. import low",
    "middle/two": "from .one import x\nfrom ..low import y",
    "high": "def answer():\n    from .middle import two\n    return two",
}
MADE_UP_LAYERS = (("made.low",), ("made.middle",), ("made.high",), ("made.__init__",))


def made_up(folder, **changes):
    for name, text in (MADE_UP | {key.replace("__in__", "/"): text for key, text in changes.items()}).items():
        path = folder / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    return graph(((folder, "made"),))


def test_a_tree_in_order_passes(tmp_path):
    edges = made_up(tmp_path)
    assert list(upward(edges, MADE_UP_LAYERS)) == [] and circle(edges) == []
    assert edges["made.high"] == [("made.middle.two", 2)]


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("from . import high", "made.high"),
        ("from .high import answer", "made.high"),
        ("import made.high as h", "made.high"),
        ("from made.middle import two", "made.middle.two"),
        ("def late():\n    from .middle.two import x", "made.middle.two"),
        ("from . import answer", "made.__init__"),
    ],
)
def test_an_upward_import_and_its_circle_are_found(text, target, tmp_path):
    edges = made_up(tmp_path, low=text)
    (sentence,) = upward(edges, MADE_UP_LAYERS)
    assert sentence == f"made.low, line {text.count(chr(10)) + 1}, imports {target}, which is not below it"
    assert {"made.low", target} <= set(circle(edges))


def test_a_circle_inside_a_unit_is_found(tmp_path):
    edges = made_up(tmp_path, middle__in__one="from . import two")
    assert list(upward(edges, MADE_UP_LAYERS)) == []
    assert circle(edges) == ["made.middle.two", "made.middle.one", "made.middle.two"]


def test_units_of_one_layer_do_not_import_each_other(tmp_path):
    edges = made_up(tmp_path)
    layers = (("made.low", "made.middle"), *MADE_UP_LAYERS[2:])
    assert {sentence.split(",")[0] for sentence in upward(edges, layers)} == {"made.middle.one", "made.middle.two"}


def test_a_module_without_a_layer_and_a_unit_without_modules_are_told(tmp_path):
    edges = made_up(tmp_path, new="")
    assert list(upward(edges, (*MADE_UP_LAYERS, ("made.gone",)))) == [
        "made.new has no layer: name it in LAYERS",
        "LAYERS names made.gone, which does not exist",
    ]
