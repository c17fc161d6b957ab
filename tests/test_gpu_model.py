"""The model of time for the CUDA kernels: its page is what it makes, says that it is a prediction, and moves the way time moves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from cuda_code import disassembler  # noqa: E402
from gpu_model import model  # noqa: E402
from gpu_model import page as gpu_model  # noqa: E402

pytest_plugins = ["cuda_library"]  # its fixtures


def test_the_page_is_up_to_date():
    done = subprocess.run([sys.executable, "-m", "gpu_model.page", "--check"], cwd=ROOT / "bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_page_measures_nothing():
    text = gpu_model.PAGE.read_text()
    assert "**Predicted, not measured.**" in text
    header = next(line for line in text.splitlines() if line.startswith("| row | what | target |"))
    measured = [i for i, name in enumerate(header.split("|")) if "measured" in name]
    rows = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == header.count("|")][1:]
    assert len(measured) == 2 and len(rows) > 20
    assert all(not row.split("|")[i].strip() for row in rows for i in measured)
    assert {row.split("|")[1].strip() for row in rows} == {str(i) for i in (*range(1, 10), 11, 12, 13)}


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
def test_no_launch_is_faster_than_its_bytes_or_than_a_smaller_one(gpu):
    before = [0.0] * 3
    for batch in (1, 8, 32, 128, 256):
        times = [
            model.head_time(gpu, batch, model.VGG_STAGES, 1000).microseconds,
            model.taps_time(gpu, batch, True, False).microseconds,
            model.taps_time(gpu, batch, False, True).microseconds,
        ]
        floors = [model.head_bytes(batch, model.VGG_STAGES, 1000) / gpu.copy, *2 * [model.taps_bytes(batch) / gpu.copy]]
        assert all(t > floor for t, floor in zip(times, floors, strict=True))
        assert all(t >= b for t, b in zip(times, before, strict=True))
        before = times


def test_a_wave_that_is_hardly_begun_costs_its_latency():
    """28 x 28 at B = 32: 416 units for 396 blocks."""
    gpu = model.GPUS[-1]
    assert list(model.waves(416, 396)) == [396, 20]
    time = model.tap_time(gpu, 32, 512, 28, True, False).microseconds
    whole = model.LAUNCH + model.PUBLISH + model.tap_bytes(32, 512, 28) * 396 / 416 / gpu.copy
    assert time == pytest.approx(whole + model.UNIT + 4 * model.MEMORY)


@pytest.mark.slow
def test_the_counts_are_those_of_the_machine_code(built, tmp_path, monkeypatch, capsys):
    if disassembler() is None:
        pytest.skip("no cuobjdump, neither of the toolkit nor of triton")
    from gpu_model import count as gpu_model_count

    monkeypatch.setattr(gpu_model_count, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(sys, "argv", ["gpu_model_count", str(built.folder)])
    gpu_model_count.main()
    counted = json.loads((tmp_path / "counts.json").read_text())["instructions"]
    assert counted == pytest.approx(model.COUNTS, rel=0.05), "PYTHONPATH=bench:tests python -m gpu_model.count build/cuda-test/cuda"
