"""Commands with a time limit each: their output is passed on line by line and logged, and what they started ends with them."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parent.parent.parent
INTERRUPTED = 10.0  # seconds from an interrupt to the end by force
STEP = 0.05  # seconds between two looks at what runs


@dataclass(frozen=True)
class Command:
    """A program with its limit in seconds."""

    name: str
    words: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a command ended: "ok", "failed (exit status 1)", "stopped after 60 s" or what it was stopped for; after so many seconds; its exit status."""

    name: str
    state: str
    seconds: float
    code: int | None = None


class Log:
    """Where all output goes: this terminal and a file, each line at once; several threads may speak."""

    def __init__(self, file: TextIO | None = None) -> None:
        self._file, self._lock = file, threading.Lock()
        self.interrupted = False  # by the user: nothing further is begun

    def __call__(self, text: str) -> None:
        with self._lock:
            print(text, flush=True)
            if self._file is not None:
                self._file.write(text + "\n")
                self._file.flush()


class Process:
    """A command that runs. `hear` gets each line of its output, in a thread of this process."""

    def __init__(self, command: Command, hear: Callable[[str], None]) -> None:
        self.command, self.started = command, time.perf_counter()
        self._cause, self._killed_at, self._hear = "", float("inf"), hear
        self._popen: subprocess.Popen[str] | None = None
        self._failed = ""
        self._error: Exception | None = None
        try:
            self._popen = subprocess.Popen(
                command.words,
                cwd=ROOT,
                env={**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits that interrupts are ignored
            )
        except OSError as error:
            self._failed = f"failed ({error})"
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen is not None and self._popen.stdout is not None
        for line in self._popen.stdout:
            try:
                self._hear(line.rstrip("\n"))
            except Exception as error:  # the lines behind it shall be heard all the same
                self._error = self._error or error

    def stop(self, cause: str, at_once: bool = False) -> None:
        """Interrupts it, so that it can write what it has; by force a little later, or at once. The first cause counts."""
        if not self._cause:
            self._cause = cause
            self._signal(signal.SIGKILL if at_once else signal.SIGINT)
            self._killed_at = time.perf_counter() + INTERRUPTED

    def _signal(self, number: int) -> None:
        if self._popen is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._popen.pid, number)

    def outcome(self) -> Outcome | None:
        """None while it runs within its limit."""
        now = time.perf_counter()
        if self._popen is None:
            return Outcome(self.command.name, self._failed, 0.0)
        code = self._popen.poll()
        if code is None:
            if now - self.started > self.command.seconds:
                self.stop(f"stopped after {self.command.seconds:.0f} s")
            if now > self._killed_at:
                self._signal(signal.SIGKILL)
            return None
        self._reader.join(2.0)
        self._signal(signal.SIGKILL)  # children that it left behind hold the pipe and the GPU
        if self._error is not None:
            raise RuntimeError(f"a line of {self.command.name} was not understood") from self._error
        state = self._cause or ("ok" if code == 0 else f"failed (exit status {code})")
        return Outcome(self.command.name, state, now - self.started, code)


def run(
    commands: Sequence[Command], say: Log, hear: Callable[[Command, str], None] | None = None, watch: Callable[[Process], Any] | None = None
) -> list[Outcome]:
    """Runs the commands at the same time -> their outcomes, in that order. An interrupt by the user ends them all.

    hear: gets each line; without it lines go to `say`, behind the command's name where there are several. watch: looks at each process again and again.
    """

    def passed_on(command: Command, line: str) -> None:
        say(line if len(commands) == 1 else f"{command.name}: {line}")

    def one(command: Command) -> Process:
        heard = hear or passed_on
        return Process(command, lambda line: heard(command, line))

    running = [one(command) for command in commands if command.seconds > 0]
    ended: dict[str, Outcome] = {command.name: Outcome(command.name, "not begun, the time was spent", 0.0) for command in commands if command.seconds <= 0}

    def left() -> list[Process]:
        return [process for process in running if process.command.name not in ended]

    try:
        while left():
            try:
                for process in left():
                    if watch is not None:
                        watch(process)
                    outcome = process.outcome()
                    if outcome is not None:
                        ended[outcome.name] = outcome
                time.sleep(STEP)
            except KeyboardInterrupt:
                say.interrupted = True
                for process in running:
                    process.stop("interrupted")
    finally:
        for process in left():  # those that an error here leaves behind
            process.stop("an error of the program that started it", at_once=True)
    return [ended[command.name] for command in commands]
