"""The part smoke: every group of checks in a process of its own, at the same time, and a limit for each check, so that a hang has a name."""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from .process import Command, Process, run
from .record import Record, machine_line, table
from .setting import Setting

GROUPS = ("head", "tap", "end", "launches", "triton")
ALONE = ("large",)  # it needs the GPU's memory
LIMIT = 30.0  # seconds for one check
BEGINNING = 90.0  # seconds until the first begins: imports, the context, the first call
BEGUN_ANEW = 3  # times that a group begins again behind a check that hung or lost the GPU


class Group:
    """One group over all of its processes: what it said, what runs and since when."""

    def __init__(self, name: str, setting: Setting, record: Record) -> None:
        self.name, self.setting, self.record = name, setting, record
        self.ended, self.expected = 0, None
        self.running, self.since, self.state = "", time.perf_counter(), ""
        self.anew, self.last = 0, ""

    def hear(self, line: str) -> None:
        """A line of the group's process: JSON that says where it is, or anything else, which is passed on."""
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            self.setting.say(f"  {self.name}: {line}")
            self.last = line.strip() or self.last
            return
        if "about" in said:
            self.record.about(said["about"])
            self.expected = said["count"]
        elif "begin" in said:
            self.running, self.since = said["begin"], time.perf_counter()
        elif "end" in said:
            self.note(said["state"], said["seconds"], said["text"])
        elif "done" in said:
            self.state = "done"

    def note(self, state: str, seconds: float, text: str = "") -> None:
        """One check ended, by itself or because it was ended."""
        self.setting.say(f"{state:7} {self.running}  {seconds:.2f} s{'  ' + text if text else ''}")
        self.record.add({"group": self.name, "check": self.running, "state": state, "seconds": seconds, "text": text})
        self.ended, self.running, self.since = self.ended + 1, "", time.perf_counter()

    def watch(self, process: Process) -> None:
        """Ends a process whose check is over its limit."""
        taken = time.perf_counter() - self.since
        if self.state == "hung" or taken <= (LIMIT if self.running else BEGINNING):
            return
        self.state = "hung"
        self.running = self.running or f"{self.name}: its first check"
        self.note("HUNG", taken, f"no end within {LIMIT if self.ended else BEGINNING:.0f} s; its process was ended")
        process.stop("hung", at_once=True)

    def ended_with(self, state: str) -> bool:
        """What became of a process that is gone; True where the group should go on behind the check that it was at."""
        if self.state == "done":
            return False
        if self.running:
            self.note("DIED", time.perf_counter() - self.since, f"its process ended in it, {state}: {self.last}")
        elif self.state != "hung" and self.expected is None:
            self.running = f"{self.name}: before its first check"
            self.note("DIED", 0.0, f"{state}: {self.last}")
            return False
        self.state, self.anew = "", self.anew + 1
        return self.anew <= BEGUN_ANEW and self.expected is not None and self.ended < self.expected

    def command(self, seconds: float) -> Command:
        words = [sys.executable, "-m", "gpu.checks", self.name, "--device", self.setting.device, "--skip", str(self.ended), "--only", self.setting.only]
        more = {"OMP_NUM_THREADS": "1" if self.setting.rehearsal else "4", "PYTHONWARNINGS": "ignore", "INTERFLOW_BACKEND": "auto"}
        if self.setting.rehearsal and self.name == "triton":
            more["TRITON_INTERPRET"] = "1"
        self.since = time.perf_counter()
        return Command(self.name, words, seconds, self.setting.environment(**more))


def smoke(setting: Setting, seconds: float) -> int:
    """All groups -> the number of checks that are not as they should be."""
    record = Record(setting.out / "smoke.json", "smoke", setting.device, setting.kit)
    until = time.perf_counter() + seconds
    groups = [Group(name, setting, record) for name in (*GROUPS, *ALONE)]
    for together in (groups[: len(GROUPS)], groups[len(GROUPS) :]):
        if not setting.say.interrupted:
            at_once(together, until)
    unfinished = [group.name for group in groups if group.state != "done"]
    record.note(unfinished=unfinished)
    setting.say(shown(record.data))
    return sum(row["state"] not in ("ok", "skipped") for row in record.data["rows"]) + len(unfinished)


def at_once(groups: Sequence[Group], until: float) -> None:
    """Runs groups until each is done, has lost the GPU too often, or the time is over."""
    waiting = {group.name: group for group in groups}
    while waiting and time.perf_counter() < until:
        names = dict(waiting)
        outcomes = run(
            [group.command(until - time.perf_counter()) for group in names.values()],
            groups[0].setting.say,
            hear=lambda command, line, names=names: names[command.name].hear(line),
            watch=lambda process, names=names: names[process.command.name].watch(process),
        )
        waiting = {o.name: names[o.name] for o in outcomes if names[o.name].ended_with(o.state) and not o.state.startswith(("stopped", "interrupted"))}


def shown(data: dict[str, Any]) -> str:
    """What is wrong, then a line for each group."""
    rows = data["rows"]
    wrong = [f"{row['state']}: {row['check']}: {row['text']}" for row in rows if row["state"] not in ("ok", "skipped")]
    names = dict.fromkeys(row["group"] for row in rows)
    counted = []
    for name in names:
        of = [row for row in rows if row["group"] == name]
        counts = [sum(row["state"] == state for row in of) for state in ("ok", "skipped")]
        finished = "no" if name in data["unfinished"] else "yes"
        counted.append([name, counts[0], counts[1], len(of) - sum(counts), finished, f"{sum(row['seconds'] for row in of):.0f} s"])
    return "\n".join(["", *wrong, table(counted, ["smoke", "ok", "skipped", "wrong", "finished", "time"]), machine_line(data)])
