"""Commands that the parts of `make gpu` run: told apart, stopped at their limit with what they started, heard to the end."""

import io
import json
import sys
import time
from pathlib import Path

import pytest
from bench_modules import room

process = room("gpu.process")


def ran(*codes, seconds=20.0, **options):
    """Outcomes of Python programs that run at the same time, and all that was said."""
    log = io.StringIO()
    commands = [process.Command(f"part{i}", [sys.executable, "-c", code], seconds) for i, code in enumerate(codes)]
    return process.run(commands, process.Log(log), **options), log.getvalue()


def test_a_command_is_run_and_told(capsys):
    (outcome,), log = ran("print('hello')")
    assert outcome.state == "ok" and log == "hello\n" and capsys.readouterr().out == log
    assert ran("raise SystemExit(3)")[0][0].state == "failed (exit status 3)"
    assert ran("print(1)", seconds=0)[0][0].state == "not begun, the time was spent"
    (outcome,) = process.run([process.Command("x", ["/no/such/program"], 5)], process.Log())
    assert "failed (" in outcome.state


MEET = """
import pathlib, sys, time
pathlib.Path({mine!r}).touch()
for _ in range(300):
    if pathlib.Path({other!r}).exists():
        print("met"); sys.exit()
    time.sleep(0.05)
sys.exit(1)
"""


def test_several_run_at_the_same_time_and_are_told_apart(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    outcomes, log = ran(MEET.format(mine=a, other=b), MEET.format(mine=b, other=a))
    assert [o.state for o in outcomes] == ["ok", "ok"] and sorted(log.splitlines()) == ["part0: met", "part1: met"]


def test_one_that_hangs_is_stopped_with_its_children():
    hang = "import subprocess, sys; print('on', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    (outcome,), log = ran(hang, seconds=2)
    assert outcome.state == "stopped after 2 s" and outcome.seconds < 15 and "on" in log


def test_one_that_ignores_the_interrupt_is_killed(monkeypatch):
    monkeypatch.setattr(process, "INTERRUPTED", 1.0)
    (outcome,), _ = ran("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)", seconds=3)
    assert outcome.state == "stopped after 3 s" and outcome.seconds < 20


def test_a_reader_that_fails_on_a_line_hears_the_rest_and_is_told_of():
    """Else a whole program would be taken for one that died, and its pipe would fill up."""
    heard = []

    def hear(command, line):
        if line == "0":
            raise FileNotFoundError("no such record")
        heard.append(line)

    with pytest.raises(RuntimeError, match="a line of part0 was not understood") as error:
        ran("for i in range(20000): print(i)", hear=hear)
    assert heard == [str(i) for i in range(1, 20000)] and isinstance(error.value.__cause__, FileNotFoundError)


def test_an_error_here_ends_what_still_runs(tmp_path):
    """A program that runs beside the one whose line was not understood does not go on by itself."""
    note = tmp_path / "pid"
    sleep = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(90)"
    speak = f"import os, time\nwhile not os.path.exists({str(note)!r}): time.sleep(0.05)\nprint(1)"
    with pytest.raises(RuntimeError, match="part1"):
        ran(sleep, speak, hear=lambda command, line: 1 / 0)
    for _ in range(100):
        stat = Path(f"/proc/{note.read_text()}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            return
        time.sleep(0.05)
    raise AssertionError("it still runs")


@pytest.mark.slow
def test_what_was_measured_survives_the_end_of_the_time(tmp_path):
    """pytest, interrupted in its second test, still writes the first one's numbers."""
    (tmp_path / "test_two.py").write_text("import time\ndef test_one(benchmark): benchmark(abs, 1)\ndef test_two(): print('on'); time.sleep(90)\n")
    options = ["-q", "-p", "no:cacheprovider", f"--benchmark-json={tmp_path / 'x.json'}", "--benchmark-max-time=0.1"]
    command = process.Command("part", [sys.executable, "-m", "pytest", str(tmp_path / "test_two.py"), *options], 30)
    (outcome,) = process.run([command], process.Log(io.StringIO()))
    assert outcome.state == "stopped after 30 s"
    assert [b["name"] for b in json.loads((tmp_path / "x.json").read_text())["benchmarks"]] == ["test_one"]
