"""The model of time for the CUDA kernels: its page is what it makes, holds what was measured, and moves the way time moves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("interflow_kernels._C", reason="the compiled module is not built")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))

from cuda_code import disassembler  # noqa: E402
from gpu_model import measured, model  # noqa: E402
from gpu_model import page as gpu_model  # noqa: E402

pytest_plugins = ["cuda_library"]  # its fixtures


def test_the_page_is_up_to_date():
    done = subprocess.run([sys.executable, "-m", "gpu_model.page", "--check"], cwd=ROOT / "bench", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_measured_cells_are_those_of_the_committed_results():
    """Each time in the page's column is a row of the results, and each row of theirs that the model predicts is in the page."""
    speed, headline = (json.loads((measured.FOLDER / f"{part}.json").read_text())["rows"] for part in ("speed", "headline"))
    timed = [row for row in speed if "us" in row and row.get("map") in ("four stages", "five boundaries")]
    kernels = [row for row in timed if row["what"] == "tap" or row["pass"] == "forward"]
    predicted = [row for row in kernels if row["what"] == "head" or row["batch"] >= 32]
    backward = [row for row in timed if (row["what"], row["pass"], row["layout"], row["batch"]) == ("head", "backward", "channels_last", 32)]
    networks = [row for row in headline if row.get("kind") == "ours" and row["model"] == "vgg16" and not row["compiled"]]
    wanted = [f"{row['us']:.1f} us, {row['share']:.2f}" for row in predicted + backward]
    wanted += [f"{row['p50_us']:.0f} us, {1 / row['speed_up']['plain'][0]:.2f}x" for row in networks]
    lines = gpu_model.PAGE.read_text().splitlines()
    header = next(line for line in lines if line.startswith("| row | what | target |") and "measured" in line)
    at = [name.strip() for name in header.split("|")].index("H200, measured")
    rows = [line.split("|") for line in lines if line.startswith("| ") and line.count("|") == header.count("|") and line[2].isdigit()]
    assert sorted(cell for row in rows if (cell := row[at].strip())) == sorted(wanted)
    assert len(wanted) > 15 and {row[1].strip() for row in rows} == {str(i) for i in (*range(1, 10), 11, 12, 13)}


def test_what_was_not_measured_stays_empty_and_is_not_refuted():
    nothing = measured.Measured({"rows": []}, {"rows": []})
    rows = [*gpu_model.head_rows(nothing), *gpu_model.tap_rows(nothing), *gpu_model.network_rows(nothing)]
    assert len(rows) > 30 and all(row.measured is None and not row.refuted() for row in rows)
    assert all("|  |  |" in line for line in list(gpu_model.table(rows))[2:])


@pytest.mark.parametrize(("times", "wrong"), [(0.79, True), (0.81, False), (1.0, False), (1.24, False), (1.26, True)])
def test_a_prediction_is_refuted_by_a_quarter(times, wrong):
    row = gpu_model.Row("1", "x", "", ("10.0 us",), 10.0, "bytes", measured.Found(10.0 * times, 0.5))
    assert row.refuted() == wrong and row.ratio() == pytest.approx(times)
    copies = [{"what": "copy", "gb_per_s": 2000.0}, {"what": "copy by a kernel", "gb_per_s": 4000.0}]
    text = "\n".join(gpu_model.refuted([row], measured.Measured({"rows": copies}, {"rows": []})))
    assert (f"x ({times:.2f})" in text) == wrong and "Plain VGG-16" not in text and "measured 4.00" in text


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
