"""The parts of `make gpu`: what a hang, a mistake or a lost GPU leaves, records, budgets, reports."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from bench_modules import report, results, room, synthetic

process, record, parts, setting = room("gpu.process"), room("gpu.record"), room("gpu.parts"), room("gpu.setting")
smoke, suites, measure = room("gpu.smoke"), room("gpu.suites"), room("gpu.measure")
speed, headline, command_line = room("gpu.speed"), room("gpu.headline"), room("gpu.__main__")
ROOT = Path(__file__).parent.parent


@pytest.mark.slow  # three seconds must be enough to begin, which they are on a quiet machine
def test_an_interrupt_ends_the_command_and_all_parts_that_follow(tmp_path, monkeypatch):
    log, begun = io.StringIO(), []
    where = setting.Setting("cpu", tmp_path, None, process.Log(log))
    sleep = "import time; print('on', flush=True); time.sleep(90)"

    def part(given, seconds):
        begun.append(seconds)
        return sum(o.state != "ok" for o in process.run([process.Command("x", [sys.executable, "-c", sleep], seconds)], given.say))

    monkeypatch.setattr(parts, "PARTS", {"info": parts.Part("", 90, part), "smoke": parts.Part("", 90, part)})
    threading.Timer(3.0, os.kill, (os.getpid(), 2)).start()
    assert parts.perform((("info", 90), ("smoke", 90)), where) == 1
    assert begun == [90] and "info" in log.getvalue() and "1 wrong" in log.getvalue()


def test_a_mistake_of_a_part_does_not_stop_the_next(tmp_path, monkeypatch):
    log, begun = io.StringIO(), []

    def broken(given, seconds):
        raise KeyError("no such row")

    monkeypatch.setattr(parts, "PARTS", {"smoke": parts.Part("", 9, broken), "speed": parts.Part("", 9, lambda given, seconds: begun.append(seconds) or 0)})
    assert parts.perform((("smoke", 9), ("speed", 8)), setting.Setting("cpu", tmp_path, None, process.Log(log))) == 1
    assert begun == [8] and "FAILED smoke" in log.getvalue() and "no such row" in log.getvalue() and "1 wrong" in log.getvalue()


# --- smoke: a hang, a lost GPU, a process that dies -----------------------------------------------------------------------
PLAYED = """
import json, sys, time
skip = int(sys.argv[sys.argv.index("--skip") + 1])
say = lambda **line: print(json.dumps(line), flush=True)
say(about={"cpu": "x", "versions": {}}, count=5)
for i in range(skip, 5):
    say(begin=f"check {i}")
    if i == 1: print("some warning", flush=True); time.sleep(90)
    if i == 2: say(end="check 2", state="failed", seconds=0.1, text="CUDA error: an illegal memory access"); sys.exit(3)
    if i == 3: print("Segmentation fault", flush=True); sys.exit(139)
    say(end=f"check {i}", state="ok", seconds=0.1, text="")
say(done=5)
"""


def played(tmp_path, monkeypatch, program, seconds=60.0, limit=3.0):
    monkeypatch.setattr(smoke, "LIMIT", limit)
    monkeypatch.setattr(smoke, "GROUPS", ("head",))
    monkeypatch.setattr(smoke, "ALONE", ())
    original = smoke.Group.command

    def command(group, left):
        made = original(group, left)
        return process.Command(made.name, [sys.executable, "-c", program, *made.words[3:]], left, made.environment)

    monkeypatch.setattr(smoke.Group, "command", command)
    log = io.StringIO()
    wrong = smoke.smoke(setting.Setting("cuda", tmp_path, None, process.Log(log)), seconds)
    return wrong, json.loads((tmp_path / "smoke.json").read_text()), log.getvalue()


def test_a_hang_has_a_name_and_the_checks_behind_it_run(tmp_path, monkeypatch):
    wrong, data, log = played(tmp_path, monkeypatch, PLAYED)
    assert [(row["check"], row["state"]) for row in data["rows"]] == [
        ("check 0", "ok"),
        ("check 1", "HUNG"),
        ("check 2", "failed"),
        ("check 3", "DIED"),
        ("check 4", "ok"),
    ]
    assert wrong == 3 and data["unfinished"] == [] and data["machine"] == {"cpu": "x", "versions": {}}
    assert "Segmentation fault" in data["rows"][3]["text"] and "no end within" in data["rows"][1]["text"]
    assert "HUNG: check 1" in log and "  head: some warning" in log  # by name at the end, and what it said


def test_a_group_that_does_not_begin_is_told(tmp_path, monkeypatch):
    wrong, data, log = played(tmp_path, monkeypatch, "raise SystemExit('no such module')")
    assert wrong == 2 and data["unfinished"] == ["head"]
    assert "no such module" in data["rows"][0]["text"] and "head: before its first check" in log


def test_smoke_ends_in_time(tmp_path, monkeypatch):
    wrong, data, _ = played(tmp_path, monkeypatch, PLAYED, seconds=4.0, limit=60.0)
    assert wrong and data["unfinished"] == ["head"] and data["rows"][-1]["state"] == "DIED" and "stopped after" in data["rows"][-1]["text"]


def test_groups_have_checks_of_their_own_names():
    runner = room("gpu.checks.__main__")
    names = [check.name for group in runner.GROUPS for check in runner.checks_of(group, torch.device("cuda", 0))]
    assert len(names) == len(set(names)) > 200
    assert set(runner.GROUPS) == {*smoke.GROUPS, *smoke.ALONE}
    for words in ("fp16 sliced", "gated", "beyond 2^31 elements, head", "two graphs", "first call", "triton tap"):
        assert any(words in name for name in names), words


def test_a_check_that_fails_or_loses_the_gpu(capsys):
    checks, runner = room("gpu.checks"), room("gpu.checks.__main__")

    def of(error):
        def run():
            raise error

        usable = runner.judged(checks.Check("x", run), torch.device("cpu"))
        return usable, json.loads(capsys.readouterr().out.splitlines()[-1])

    assert of(AssertionError("y[0]: 1, expected 2"))[0] and of(AssertionError("a"))[1]["state"] == "failed"
    assert of(checks.Skipped("needs 24 GiB"))[1] == of(checks.Skipped("needs 24 GiB"))[1] | {"state": "skipped", "text": "needs 24 GiB"}
    usable, line = of(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not usable and "illegal memory access" in line["text"]


def test_expectations_of_the_head_stay_on_the_cpu(monkeypatch):
    """On a device that is not the CPU's, though of no numbers: the fused head and all that it gets lie there, the plain head and its maps do not.

    from_eager shares its parameters: on the CPU itself nothing moves, and a plain head that moves along with the fused one goes unseen.
    """
    monkeypatch.setattr(torch.__future__, "get_swap_module_params_on_conversion", lambda: True)  # a parameter stays the same object, as on a GPU
    head, called = room("gpu.checks.head"), []
    original = head.gradients

    def noted(module, features, dy, dbranches):
        given = (*module.parameters(), *module.buffers(), *features, *(t for t in (dy, dbranches) if t is not None))
        called.append({t.device.type for t in given})
        return original(module, features, dy, dbranches)

    monkeypatch.setattr(head, "gradients", noted)
    ran = 0
    for check in head.checks(torch.device("meta")):
        called.clear()
        with pytest.raises(NotImplementedError):  # what was computed there cannot be read
            check.run()
        assert called in ([], [{"meta"}, {"cpu"}]), (check.name, called)
        ran += bool(called)
    assert ran > 20


# --- what a part leaves ---------------------------------------------------------------------------------------------------
def test_a_record_is_whole_after_every_row(tmp_path):
    made = record.Record(tmp_path / "x/part.json", "speed", "cuda")
    made.about({"gpu": "made-up GPU", "gpu_sm_mhz": "1980", "gpu_memory_mhz": "3201", "gpu_driver": "580", "versions": {"torch": "2.11.0", "python": "3.12"}})
    for i in range(3):
        made.add({"i": i})
        assert [row["i"] for row in json.loads((tmp_path / "x/part.json").read_text())["rows"]] == list(range(i + 1))
    data = json.loads((tmp_path / "x/part.json").read_text())
    assert record.machine_line(data).startswith("made-up GPU at 1980 MHz, memory 3201 MHz, driver 580; torch 2.11.0, python 3.12; commit ")
    assert re.fullmatch(r"[0-9a-f]{10}\+?|unknown", data["commit"]) and [path.name for path in (tmp_path / "x").iterdir()] == ["part.json"]
    assert record.table([["a", 1], ["bcd", 22]], ["x", "y"]) == "x    y\na    1\nbcd  22"


def test_a_record_takes_rows_from_several_threads(tmp_path):
    """Those that read the output of programs which run at the same time."""
    made, start = record.Record(tmp_path / "part.json", "smoke", "cuda"), threading.Barrier(8)

    def write(worker):
        start.wait()
        for i in range(25):
            made.add({"worker": worker, "i": i})
            made.note(newest=worker)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, worker) for worker in range(8)]:
            done.result()
    rows = json.loads((tmp_path / "part.json").read_text())["rows"]
    assert sorted((row["worker"], row["i"]) for row in rows) == [(worker, i) for worker in range(8) for i in range(25)]


def test_the_commit_is_the_kits_where_there_is_no_git(tmp_path, monkeypatch):
    (tmp_path / "interflow_kernels").mkdir()
    (tmp_path / "interflow_kernels/build_info.json").write_text('{"commit": "0123456789"}')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert record.commit(tmp_path) == "0123456789" and record.commit() == "unknown"


def test_results_of_pytest_are_counted(tmp_path):
    xml = tmp_path / "x.xml"
    xml.write_text(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c"><failure message="no"/></testcase>'
        '<testcase classname="a" name="d"><skipped message="one GPU here"/></testcase></testsuite></testsuites>'
    )
    counts = suites.counted(xml)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "failures": ["a::c"], "reasons": ["one GPU here"]}
    assert not suites.right({"state": "ok", **counts}) and not suites.right({"state": "ok"})
    assert suites.right({"state": "ok", "passed": 1, "failed": 0}) and not suites.right({"state": "ok", "passed": 0, "failed": 0})
    assert suites.counted(tmp_path / "none.xml") == {}
    data = {"rows": [{"suite": "native", "state": "failed (exit status 1)", "seconds": 5.0, **counts}], "machine": {}, "commit": "x"}
    assert suites.shown(data).splitlines()[1] == "FAILED native: a::c"


# --- which parts, with which limits and commands --------------------------------------------------------------------------
def test_no_part_takes_more_than_200_seconds_and_a_visit_no_more_than_230():
    assert {"smoke", "speed", "test", "headline", "bench"} <= set(parts.PARTS)
    assert all(part.seconds <= 200 for part in parts.PARTS.values())
    for name, call in parts.CALLS.items():
        assert sum(seconds for _, seconds in call) <= 230, name
        script = ROOT / f"bench/gpu/{name}.sh"
        assert os.access(script, os.X_OK) and f"-m gpu {name} " in script.read_text()
    assert command_line.asked(["smoke"], None, rehearsal=True)[0][1] > 200
    assert command_line.asked(["smoke", "call2"], None) == (("smoke", 200), ("test", 200))
    assert [name for name, _ in command_line.asked(["all"], 60)] == list(parts.PARTS)
    assert {part for call in parts.CALLS.values() for part, _ in call} == set(parts.PARTS) - {"build"}
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"gpu-{name}" in makefile for name in parts.PARTS)


def test_a_part_builds_for_one_gpu_and_never_times_a_fallback(tmp_path, monkeypatch):
    told = []
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(parts, "run", lambda commands, say: told.extend(commands) or [process.Outcome(commands[0].name, "ok", 1.0, 0)])
    where = setting.Setting("cuda", tmp_path, None, process.Log(io.StringIO()), (9, 0))
    for name in ("build", "speed", "headline"):
        assert parts.PARTS[name].run(where, 100) == 0
    assert told[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a" and told[0].environment["INTERFLOW_CUDA"] == "1"
    for command in told[1:]:
        assert command.environment["INTERFLOW_BACKEND"] == "native" and command.words[command.words.index("--budget") + 1] == "85"
        assert "INTERFLOW_LIBRARIES" not in command.environment
    parts.PARTS["blocks"].run(where, 100)
    assert told[-1].environment["INTERFLOW_MAX_BLOCKS"] == "0" and told[-1].words[-4:] == ["--only", "B=32", "--name", "blocks"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    parts.PARTS["build"].run(where, 100)
    assert told[-1].environment["TORCH_CUDA_ARCH_LIST"] == "8.0"
    assert [setting.architecture(c) for c in ((8, 0), (9, 0), (12, 0))] == ["8.0", "9.0a", "12.0"]
    assert setting.folder_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_with_a_kit_nothing_is_built_and_its_libraries_are_named(tmp_path, monkeypatch):
    kit = tmp_path / "kit"
    (kit / "interflow_kernels").mkdir(parents=True)
    (kit / "interflow_kernels/build_info.json").write_text('{"commit": "0123456789", "sources": "x"}')
    monkeypatch.setattr(parts, "run", lambda *_: pytest.fail("built"))
    where = setting.Setting("cuda", tmp_path, setting.kit_at(str(kit)), process.Log(io.StringIO()), (9, 0))
    assert parts.PARTS["build"].run(where, 100) == 0
    assert where.environment()["INTERFLOW_LIBRARIES"] == str(kit / "interflow_kernels")
    assert setting.kit_at("none") is None
    with pytest.raises(setting.Unusable, match=r"--kit must be a folder that `make gpu-kit` made, got .*; run `make gpu-kit`"):
        setting.kit_at(str(tmp_path))
    assert "built from other sources (commit 0123456789); run `make gpu-kit` again" in room("gpu.kit").differs(kit)


def test_the_suites_get_workers_and_few_examples(tmp_path):
    where = setting.Setting("cuda", tmp_path, None, process.Log(io.StringIO()), (9, 0))
    first, beside = suites.suites(False)
    native, triton, sanitizer = (suites.command(suite, where, 90.0) for suite in (*first, *beside))
    assert {"tests/gpu/test_gpu_tap.py", "tests/gpu/test_gpu_training.py", "tests/test_cuda_stage_tap.py"} <= set(native.words)
    assert suites.SANITIZER not in native.words and all((ROOT / path).exists() for path in (suites.TRITON, suites.SANITIZER))
    assert not any(word.startswith(suites.TRITON) or "vision" in word for word in native.words)
    assert triton.environment["INTERFLOW_EXAMPLES"] == "8" and triton.words[triton.words.index("-n") + 1] == "12"
    assert sanitizer.words[sanitizer.words.index("-k") + 1] == "memcheck or racecheck"
    for command in (native, triton, sanitizer):
        assert command.words[1:3] == ["-m", "pytest"] and command.words[command.words.index("-m", 3) + 1] == "gpu"


def test_budgets_shrink_together_and_the_full_set_has_none(tmp_path):
    where = setting.Setting("cuda", tmp_path, None, process.Log(io.StringIO()), (9, 0), only="inference")
    programs = measure.programs(where)
    assert {program.name for program in programs} == set(measure.BUDGETS)
    assert sum(measure.BUDGETS.values()) + measure.GRACE + measure.REPORT <= parts.PARTS["bench"].seconds

    def given(left):
        """Where each takes what it is given."""
        found = {}
        for i, program in enumerate(programs):
            found[program.name] = measure.allowed(programs[i:], left)
            left -= found[program.name]
        return found, left

    more, left = given(measure.GRACE + 2 * sum(measure.BUDGETS.values()))
    assert more == pytest.approx({name: 2 * budget for name, budget in measure.BUDGETS.items()}) and left == pytest.approx(measure.GRACE)
    some, _ = given(measure.GRACE + 70.0)
    assert list(some.values()) == [30.0, 35.0, 0.0, 0.0, 0.0]  # the first ones whole, rather than a little of each
    assert measure.allowed(programs, 5.0) == 0 and measure.command(programs[0], where, 0.0).seconds == 0
    assert measure.command(programs[0], where, 40.0).words[-2:] == ["--budget", "40"]
    full = setting.Setting("cuda", tmp_path, None, process.Log(io.StringIO()), (9, 0), full=True, only="inference")
    for program in measure.programs(full):
        command = measure.command(program, full, 40.0)
        assert command.seconds == measure.FULL and "--budget" not in command.words
        assert ("--full" in command.words and "--case" in command.words) or "--compiled" in command.words


def test_cells_and_rows_come_by_what_they_tell():
    cells = list(headline.cells())
    assert cells[0].name == "vgg16, training step, 224px bf16 channels_last B=32"
    found = {(c.model, c.direction, c.batch, c.compiled) for c in cells}
    assert len(found) == len(cells) == 2 * 2 * 2 * 2 and not any(c.compiled for c in cells[:6])
    rows = list(speed.planned(torch.device("cuda", 0)))
    assert rows[0][1] == {"batch": 32, "layout": "channels_last", "map": "four stages"} and {b["batch"] for _, b, _ in rows} == {1, 8, 32, 128, 256}
    assert speed.goal("tap", "backward", {"batch": 32, "layout": "nchw"}) == ("share", 0.82)
    assert (
        speed.goal("head", "forward", {"batch": 1, "layout": "nchw"}) == ("us", 8.0) and speed.goal("head", "backward", {"batch": 1, "layout": "nchw"}) is None
    )


# --- the report of the part bench -------------------------------------------------------------------------------------------
def file_of(run_, **run_info):
    """What pytest-benchmark would have written of made-up rows."""
    machine = {**run_.machine, "gpu": "made-up GPU"}
    data = {"machine_info": machine, "commit_info": {"id": "f" * 40}, "datetime": "2026-01-01T00:00:00", "run": {**run_.run, **run_info}}
    return json.dumps(data | {"benchmarks": [{"extra_info": row} for row in run_.rows]})


def test_results_of_the_programs_become_one_report_and_a_failed_one_is_named(tmp_path, monkeypatch):
    """Made-up numbers in a temporary folder."""
    log, out = io.StringIO(), tmp_path / "out"
    out.mkdir()
    write = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(sys.argv[2])"
    texts = [file_of(synthetic(seed, cases=2), timed_s=4, whole_s=10) for seed in (0, 1)]
    made = [
        measure.Program(name, [sys.executable, "-c", write, str(out / name), text], out / name)
        for name, text in zip(("bench_head", "profile"), texts, strict=True)
    ]
    made.insert(1, measure.Program("bench_triton", [sys.executable, "-c", "raise SystemExit(1)"], out / "broken.json"))
    monkeypatch.setattr(measure, "programs", lambda _: made)
    assert measure.measure(setting.Setting("cuda", out, None, process.Log(log)), 150.0) == 1
    assert sorted(path.name for path in out.iterdir()) == ["report.html", "report.md", "results.json", "speed.png"]
    loaded = results.load(out)
    assert len(loaded.rows) == 12 and loaded.run == {"set": "gpu", "timed_s": 8, "others_cores": 0.0, "whole_s": 20}
    assert "made-up GPU" in (out / "report.md").read_text() and "Made by `make gpu`" in report.markdown(loaded)
    assert "failed: bench_triton" in log.getvalue() and ">= 2x the best peer" in log.getvalue() and "reached" in log.getvalue()
    (out / "full.json").write_text(file_of(synthetic(0, cases=1), set="full"))
    assert measure.merged([out / "full.json"])["run"]["set"] == "gpu-full" and "gpu-full" in report.MADE_BY
    assert measure.merged([]) is None


def test_without_a_gpu_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, "-m", "gpu", "smoke"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": "bench"})
    assert done.returncode == 2
    assert done.stderr.startswith("make gpu needs torch and an NVIDIA GPU") and "DEVICE=cpu" in done.stderr and done.stderr.count("\n") == 1
