"""The parts of `make gpu`, by name: python -m gpu PART... with bench/ in PYTHONPATH. Results and log.txt go to OUT."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import setting as settings
from .kit import differs
from .parts import CALLS, PARTS, perform
from .process import ROOT, Log

ALL = "all"
SLOWER = 4  # times as long as on a GPU machine, at most


def asked(names: Sequence[str], seconds: float | None, rehearsal: bool = False) -> tuple[tuple[str, float], ...]:
    """(part, limit) of the names: parts, a call's parts, or all of them. A rehearsal takes seconds, but on a CPU that may be busy."""
    found: list[tuple[str, float]] = []
    for name in names:
        found += CALLS[name] if name in CALLS else [(part, PARTS[part].seconds) for part in (PARTS if name == ALL else [name])]
    return tuple((name, seconds or (SLOWER * limit if rehearsal else limit)) for name, limit in found)


def main(arguments: Sequence[str]) -> int:
    listed = "\n".join(f"  {name:9} {part.says}; {part.seconds:.0f} s" for name, part in PARTS.items())
    calls = "\n".join(f"  {name:9} {', '.join(part for part, _ in parts)}" for name, parts in CALLS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"parts:\n{listed}\n{calls}", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=[*PARTS, *CALLS, ALL], metavar="PART", help="what follows, or all of it")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal in seconds, which measures nothing")
    parser.add_argument("--out", default="", help="where results go; default: bench/results/ and the GPU's name")
    parser.add_argument("--kit", default="", help="the folder of `make gpu-kit`, or none; default: build/gpu-kit where it is there")
    parser.add_argument("--seconds", type=float, default=None, help="instead of each part's own limit")
    parser.add_argument("--only", default="", help="only smoke checks and cases whose name contains this text")
    parser.add_argument("--full", action="store_true", help="bench: every case, hours; results in a folder of their own, whose name ends in -full")
    given = parser.parse_args(arguments)
    try:
        kit = settings.kit_at(given.kit)
        name, capability = settings.gpu() if given.device == "cuda" else ("rehearsal", None)
    except settings.Unusable as reason:
        print(reason, file=sys.stderr)
        return 2
    folder = ROOT / "build/gpu-rehearsal" if capability is None else ROOT / "bench/results" / (settings.folder_name(name) + "-full" * given.full)
    out = Path(given.out).resolve() if given.out else folder
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "a") as log:
        where = settings.Setting(given.device, out, kit, Log(log), capability, given.full, given.only)
        if kit is not None and (other := differs(kit)) is not None:
            where.say(other)
        return perform(asked(given.parts, given.seconds, where.rehearsal), where)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
