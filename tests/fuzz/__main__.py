"""The command: starts the children, starts them again behind a call that ended one, and reports. See the package's docstring."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from .child import TARGETS, draw, judge, told

PATIENCE = 300.0  # seconds without progress after which a child counts as hung; a busy machine is slow


def run_target(target: str, seed: int, first: int, calls: int, folder: Path) -> list[dict[str, object]]:
    """All calls of a target, in as many children as it takes; findings, crashes and hangs among them."""
    folder.mkdir(parents=True)
    progress, findings = folder / "progress", folder / "findings"
    progress.touch()
    findings.touch()
    extra: list[dict[str, object]] = []
    end = first + calls
    while first < end:
        with (folder / "stderr").open("w") as stderr:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.child", target, str(seed), str(first), str(min(1000, end - first)), str(folder)], stderr=stderr
            )
            last, moved = -1, time.monotonic()
            while child.poll() is None:
                time.sleep(0.2)
                if progress.stat().st_size != last:
                    last, moved = progress.stat().st_size, time.monotonic()
                elif time.monotonic() - moved > PATIENCE:
                    child.kill()
        lines = progress.read_text().splitlines()
        reached = int(lines[-1].split()[0]) if lines else first
        if child.returncode != 0:
            said = (folder / "stderr").read_text()[-1500:]
            extra.append(
                {"target": target, "number": reached, "wrong": f"the process ended with {child.returncode} (negative: a signal; -9: hung)", "stderr": said}
            )
            if not lines or reached < first:
                break  # it does not even start
        first = max(first, reached) + 1
    return [json.loads(line) for line in findings.read_text().splitlines()] + extra


def counted(folder: Path) -> str:
    """How many calls ended how, and the longest."""
    lines = [line.split() for line in (folder / "progress").read_text().splitlines()]
    done = [line for line in lines if len(line) == 4]
    kinds = Counter(f"{line[2]} {line[1]}" for line in done)
    return (
        f"{len(done)} calls: "
        + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        + f"; longest {max((float(line[3]) for line in done), default=0):.2f} s"
    )


def again(target: str, seed: int, number: int) -> int:
    """One call in this process, told at length."""
    call = draw(target, seed, number)
    for name, value in call.arguments.items():
        print(f"  {name} = {told(value)}")
    print(f"  broken: {', '.join(call.broken) or 'nothing'}", flush=True)
    wrong, outcome, seconds = judge(call)
    print(f"  {outcome} in {seconds:.4f} s; {wrong or 'as it should be'}")
    return int(wrong is not None)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random calls of every public function, module and raw operator.")
    parser.add_argument("--calls", type=int, default=20000, help="of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first call")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all; may be given several times")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one call of one target, in this process")
    parser.add_argument("--show", type=int, default=20, help="so many findings of each target are printed")
    arguments = parser.parse_args()
    chosen = arguments.target or list(TARGETS)
    if arguments.only is not None:
        return max(again(target, arguments.seed, arguments.only) for target in chosen)
    total = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in chosen:
            begin = time.monotonic()
            found = run_target(target, arguments.seed, arguments.first, arguments.calls, Path(folder, target))
            total += len(found)
            print(f"{target}: {counted(Path(folder, target))}; {len(found)} findings, {time.monotonic() - begin:.0f} s", flush=True)
            for finding in found[: arguments.show]:
                print(f"  --target {target} --seed {arguments.seed} --only {finding['number']}: {finding['wrong']}", flush=True)
    return int(total > 0)


if __name__ == "__main__":
    sys.exit(main())
