"""`interflow export` and `interflow predict --engine`: every format read back and run, alone with torch, and from C++."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import interflow_kernels
from interflow_vision import create_model
from interflow_vision.cli import command as cli
from interflow_vision.serving import formats, packages
from interflow_vision.serving.engines import ENGINES, engine, largest_difference
from interflow_vision.training import checkpoints

ROOT = Path(__file__).resolve().parent.parent.parent
FAST = ("exported", "torchscript", "onnx", pytest.param("openvino", marks=pytest.mark.slow))


def need(*names):
    """Skips where a package that only serving needs is not installed."""
    for name in names:
        pytest.importorskip(name, reason=f"{name} is not installed (pip install 'interflow-kernels[serve]')", exc_type=ImportError)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments): exit code, lines of stdout, lines of stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["interflow", *map(str, arguments)])
        capsys.readouterr()
        code = cli.main()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    return run


def images(batch, channels=3, size=16):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("name", FAST)
def test_what_is_exported_gives_the_checkpoints_scores(name, command, checkpoint, tmp_path):
    need(*formats.FORMATS[name].needs)
    out = tmp_path / f"digits{formats.FORMATS[name].suffix}"
    code, lines, errors = command("export", checkpoint, "--format", name, "--out", out)
    assert (code, errors) == (0, []), errors
    assert len(lines) == 1 and lines[0].startswith(f"{out}: images [B, 3, 16, 16] -> scores [B, 10], within ")
    scores, classifier = formats.read(name, out), checkpoints.load(checkpoint)
    for batch in (1, 2, 7):
        with torch.no_grad():
            assert largest_difference(scores(images(batch)), classifier(images(batch))) < 1e-4
    about = json.loads(out.with_name(f"{out.name}.json").read_text())
    assert about["preprocessing"] == classifier.preprocessing.as_dict() and about["format"] == name
    assert about["class_names"] == list(classifier.class_names)


@pytest.mark.parametrize("head", [pytest.param("gated", marks=pytest.mark.slow), pytest.param("classwise", marks=pytest.mark.slow), "concat"])
def test_heads_that_are_not_folded_are_exported_too(head, tmp_path):
    options = {"head": "concat"} if head == "concat" else {"attention": head}
    network = create_model("vgg16", width=1 / 32, **options).eval().for_inference()
    for name in ("exported", "torchscript"):
        path = tmp_path / f"network{formats.FORMATS[name].suffix}"
        formats.write(name, network, images(2), path)
        with torch.no_grad():
            assert largest_difference(formats.read(name, path)(images(5)), network(images(5))) < 1e-6, name


ALONE = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
with torch.no_grad():
    torch.save([torch.export.load(sys.argv[2]).module()(x), torch.jit.load(sys.argv[3])(x)], sys.argv[4])
assert not [name for name in sys.modules if name.startswith("interflow")]
"""


def test_a_process_that_imports_only_torch_runs_programs(checkpoint, tmp_path):
    network = checkpoints.load(checkpoint).model.for_inference()
    paths = [tmp_path / name for name in ("network.pt2", "network.ts", "scores.pt")]
    for name, path in zip(("exported", "torchscript"), paths, strict=False):
        formats.write(name, network, images(2), path)
    code = [sys.executable, "-W", "ignore", "-c", ALONE, interflow_kernels.library_path(), *paths]
    done = subprocess.run(list(map(str, code)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        expected = network(images(3))
    for scores in torch.load(paths[2]):
        assert torch.equal(scores, expected)


# --- AOTInductor ------------------------------------------------------------------------------------------------------------
PACKAGED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
torch.save(torch._inductor.aoti_load_package(sys.argv[2])(x), sys.argv[3])
assert not [name for name in sys.modules if name.startswith("interflow")]
"""


@pytest.fixture(scope="module")
def package(checkpoint, tmp_path_factory):
    """The checkpoint as a package, and its network."""
    path = tmp_path_factory.mktemp("package") / "digits.aoti.pt2"
    network = checkpoints.load(checkpoint).model.for_inference()
    formats.write("aoti", network, images(2), path)
    return path, network


@pytest.mark.slow
def test_a_package_runs_in_a_process_that_imports_only_torch(package, tmp_path):
    path, network = package
    code = [sys.executable, "-c", PACKAGED, interflow_kernels.library_path(), path, tmp_path / "scores.pt"]
    done = subprocess.run(list(map(str, code)), capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with torch.no_grad():
        assert largest_difference(torch.load(tmp_path / "scores.pt"), network(images(3))) < 1e-5


@pytest.mark.slow
def test_a_package_runs_from_cpp(package, tmp_path):
    """docs/run_package.cpp, built as its header says."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    path, network = package
    torch_folder, program = Path(torch.__path__[0]), tmp_path / "run_package"
    link = [f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"]
    words = [compiler, "-std=c++20", f"-I{torch_folder}/include", ROOT / "docs/run_package.cpp", "-o", program, *link]
    built = subprocess.run(list(map(str, words)), capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    words = [program, interflow_kernels.library_path(), path, 3, 3, 16]
    done = subprocess.run(list(map(str, words)), capture_output=True, input=images(3).numpy().tobytes())
    assert done.returncode == 0, done.stderr
    scores = torch.tensor([[float(number) for number in line.split()] for line in done.stdout.decode().splitlines()])
    with torch.no_grad():
        expected = network(images(3))
    assert scores.shape == expected.shape and largest_difference(scores, expected) < 1e-5
    short = subprocess.run([*map(str, words[:3]), "4", "3", "16"], capture_output=True, input=images(3).numpy().tobytes())
    assert short.returncode == 1 and b"stdin ended before 4 images" in short.stderr


@pytest.mark.slow
def test_the_command_writes_packages(command, checkpoint, tmp_path):
    code, lines, errors = command("export", checkpoint, "--format", "aoti", "--out", tmp_path / "digits.aoti.pt2")
    assert (code, errors) == (0, []) and "within" in lines[0]


# --- engines ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["torch", "onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
def test_engines_predict_the_same(name, command, checkpoint, digit_files):
    if name != "torch":
        need(*formats.FORMATS[ENGINES[name]].needs)
    code, lines, errors = command("predict", "--ckpt", checkpoint, "--engine", name, *digit_files)
    assert (code, errors) == (0, []), errors
    classifier = checkpoints.load(checkpoint)
    with torch.no_grad():
        expected = classifier(torch.stack([classifier.preprocessing.read(file) for file in digit_files])).softmax(1)
    for line, p in zip(lines, expected, strict=True):
        _, label, probability = line.split("\t")
        assert label == str(p.argmax().item()) and float(probability) == pytest.approx(p.max().item(), abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ENGINES if name != "torch"])
def test_engines_take_batches_and_memory_formats(name):
    need(*formats.FORMATS[ENGINES[name]].needs)
    network = create_model("vgg16_bn", "gated", width=1 / 32).eval().for_inference()
    scores = engine(name, network, images(2))
    for batch in (1, 4):
        x = images(batch).to(memory_format=torch.channels_last)
        assert largest_difference(scores(x), network(x)) < 1e-4


# --- what does not fit ------------------------------------------------------------------------------------------------------
def test_a_missing_package_is_one_sentence(command, checkpoint, monkeypatch, tmp_path):
    def missing(name, *_):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    for words in (("export", checkpoint, "--format", "onnx", "--out", tmp_path / "x.onnx"), ("predict", "--ckpt", checkpoint, "--engine", "openvino", "x.png")):
        code, lines, errors = command(*words)
        assert (code, lines, len(errors)) == (2, [], 1)
        assert 'which is not installed: pip install "interflow-kernels[serve]"' in errors[0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--format", "exported", "--out", "none/there.pt2"), "there is no folder none: make it, or choose another file with --out"),
        (("--format", "openvino", "--out", "network.onnx"), "--out must end in .xml for the format openvino"),
        (("--format", "tflite"), "argument --format: invalid choice: 'tflite'"),
        ((), "the following arguments are required: --format"),
    ],
)
def test_arguments_that_do_not_fit(words, sentence, command, checkpoint):
    code, lines, errors = command("export", checkpoint, *words)
    assert (code, lines, len(errors)) == (2, [], 1) and sentence in errors[0]


def test_a_file_with_other_scores_is_refused(command, checkpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(formats, "read", lambda name, path: lambda x: torch.zeros(len(x), 10))
    code, _, errors = command("export", checkpoint, "--format", "torchscript", "--out", tmp_path / "digits.ts")
    assert code == 2 and "gives other scores than" in errors[0] and errors[0].endswith("do not use it")


def test_a_gpu_for_an_engine_that_has_none(command, checkpoint, monkeypatch):
    monkeypatch.setattr("interflow_vision.cli.predict.usable_device", torch.device)
    code, _, errors = command("predict", "--ckpt", checkpoint, "--engine", "onnxruntime", "--device", "cuda", "x.png")
    assert code == 2 and errors == ["interflow: --engine onnxruntime runs on the CPU here, got --device cuda; leave one of the two out"]


def test_library_path():
    assert interflow_kernels.library_path().name.startswith("_cpu.")
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'xpu'"):
        interflow_kernels.library_path("xpu")
    if torch.version.cuda is None:
        with pytest.raises(RuntimeError, match="there is no library of compiled operators for 'cuda': torch .* is a build without CUDA"):
            interflow_kernels.library_path("cuda")
