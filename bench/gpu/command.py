"""What the measuring parts' commands share: their options, the device, and the record that they fill."""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import machine

from .record import Record


@dataclass(frozen=True)
class Begun:
    """device: the first GPU, or the CPU of a rehearsal. until: by time.perf_counter(). only: what names must contain."""

    device: torch.device
    record: Record
    until: float
    only: str

    @property
    def rehearsal(self) -> bool:
        return self.device.type != "cuda"


def begin(name: str, description: str | None, arguments: list[str], budget: float) -> Begun:
    """Reads the options and opens OUT/NAME.json with what is known about the machine. A rehearsal takes one thread."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, default=budget, help="seconds; nothing is begun that would not end in time")
    parser.add_argument("--name", default=name, help="of the JSON file")
    parser.add_argument("--only", default="", help="what has this text in its name")
    parser.add_argument("--kit", type=Path, default=None, help="where the libraries come from, for the commit that they were built from")
    given = parser.parse_args(arguments)
    until = time.perf_counter() + given.budget
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device(given.device)
    if device.type != "cuda":
        torch.set_num_threads(1)
    record = Record(given.out / f"{given.name}.json", given.name, device.type, given.kit)
    record.about(machine.describe(device))
    return Begun(device, record, until, given.only)
