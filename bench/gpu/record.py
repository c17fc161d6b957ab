"""What a part leaves: JSON with the machine, its clocks, versions and the commit, written anew after every row, and a short table of it."""

import datetime
import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .process import ROOT


def commit(kit: Path | None = None) -> str:
    """Of this tree, with "+" where files differ from it; without git, that which the kit was built from; else "unknown"."""
    try:
        head = _git("rev-parse", "HEAD")[:10]
        return head + "+" * bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        built = kit / "interflow_kernels/build_info.json" if kit is not None else None
        return json.loads(built.read_text()).get("commit", "unknown") if built is not None and built.exists() else "unknown"


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


class Record:
    """One part's file. `rows` are whatever the part measures or checks; `about` may come later than they do. Several threads may write."""

    def __init__(self, path: Path, part: str, device: str, kit: Path | None = None) -> None:
        self.path, self._lock = path, threading.Lock()
        self.data: dict[str, Any] = {
            "part": part,
            "device": device,
            "rehearsal": device != "cuda",
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "commit": commit(kit),
            "kit": kit is not None,
            "machine": {},
            "rows": [],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def about(self, machine: Mapping[str, Any]) -> None:
        """harness.machine.describe of the process that measures."""
        with self._lock:
            if not self.data["machine"]:
                self.data["machine"] = dict(machine)
                self._write()

    def add(self, row: Mapping[str, Any]) -> None:
        with self._lock:
            self.data["rows"].append(dict(row))
            self._write()

    def note(self, **values: Any) -> None:
        """What belongs to the whole part."""
        with self._lock:
            self.data.update(values)
            self._write()

    def _write(self) -> None:
        """So that a reader finds the old file or the new one, whatever ends this process."""
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(beside, self.path)


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Columns as wide as their widest cell, numbers and texts alike to the left."""
    every = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every)


def machine_line(data: Mapping[str, Any]) -> str:
    """GPU, clocks, versions and commit in one line, under every table."""
    m = data["machine"]
    if not m:
        return f"no machine known, commit {data['commit']}"
    versions = m["versions"]
    clocks = f" at {m['gpu_sm_mhz']} MHz, memory {m['gpu_memory_mhz']} MHz, driver {m['gpu_driver']}" if "gpu_driver" in m else ""
    shown = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "python") if name in versions)
    return f"{m.get('gpu') or m['cpu']}{clocks}; {shown}; commit {data['commit']}" + "; a rehearsal, no measurement" * data["rehearsal"]
