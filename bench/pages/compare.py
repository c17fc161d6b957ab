"""Two runs side by side, what changed and whether it is more than noise: make bench-compare A=FOLDER B=FOLDER

Two runs happen at two times, so a machine that was busier meets one of them only. Each provider is therefore judged beside its case's
yardstick, which ran in the same rounds: the copy or read limit, else the plain network, else eager PyTorch. The raw ratio stands next to it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from harness.stats import holm, rank_p_value, unpaired_ratio_interval

from pages.results import Results, Row, busy, load, machine_line, run_command, samples

YARDSTICKS = ("copy", "read", "torch.empty", "plain", "none", "eager", "eager head(xs)", "Interflow naive")
SIGNIFICANT = 0.05
SMALLEST = 0.05
"""A change below this is never called one: memory placement alone moves one build by some percent from process to process."""


@dataclass(frozen=True)
class Change:
    """One provider of one case in A and in B. ratio: time B / time A beside the yardstick (median, low, high); p after Holm's correction."""

    case: str
    provider: str
    raw: float
    ratio: tuple[float, float, float]
    yardstick: str
    p: float
    quiet: bool  # both runs

    @property
    def verdict(self) -> str:
        if not self.quiet or self.p >= SIGNIFICANT or abs(self.ratio[0] - 1) < SMALLEST:
            return "-"
        return "slower" if self.ratio[0] > 1 else "faster"


def changes(a: Results, b: Results) -> list[Change]:
    """Every provider that both runs have, corrected for their number."""
    found = []
    for row in a.rows:
        other = b.case(row["case"]).get(row["provider"])
        yardstick = next((name for name in YARDSTICKS if name in a.case(row["case"]) and name in b.case(row["case"])), None)
        if other is None or yardstick is None or yardstick == row["provider"]:
            continue
        mine, theirs = beside(row, a.case(row["case"])[yardstick]), beside(other, b.case(row["case"])[yardstick])
        found.append((row, other, yardstick, unpaired_ratio_interval(theirs, mine), rank_p_value(mine, theirs)))
    corrected = holm([p for *_, p in found])
    quiet = not busy(a) and not busy(b)
    return [Change(row["case"], row["provider"], o["p50_us"] / row["p50_us"], r, y, p, quiet) for (row, o, y, r, _), p in zip(found, corrected, strict=True)]


def beside(row: Row, yardstick: Row) -> list[float]:
    """time / the yardstick's time, round by round."""
    return [x / y for x, y in zip(samples(row), samples(yardstick), strict=True)]


def report(a: Results, b: Results) -> str:
    made = sorted(changes(a, b), key=lambda change: (change.verdict == "-", -abs(change.ratio[0] - 1)))
    changed = [change for change in made if change.verdict != "-"]
    lines = [f"A: {machine_line(a)}", f"B: {machine_line(b)}", ""]
    if busy(a) or busy(b):
        lines += ["Other processes took part of the machine in one of the runs, and they do not slow all providers alike: no verdicts.", ""]
    lines += [f"{len(changed)} of {len(made)} changed (p < {SIGNIFICANT:g} after Holm's correction and by {SMALLEST:.0%} or more).", ""]
    lines += ["| case | provider | B / A beside the yardstick [95 %] | yardstick | B / A raw | p, corrected | B is |", "|---|---|---|---|---|---|---|"]
    for c in made:
        ratio = f"{c.ratio[0]:.3f} [{c.ratio[1]:.3f}, {c.ratio[2]:.3f}]"
        lines.append(f"| {c.case} | {c.provider} | {ratio} | {c.yardstick} | {c.raw:.3f} | {c.p:.2g} | {c.verdict} |")
    missing = sorted({row["case"] for row in a.rows} ^ {row["case"] for row in b.rows})
    lines += ["", f"Only in one of them: {', '.join(missing)}."] if missing else []
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    run_command(lambda: print(report(load(Path(sys.argv[1])), load(Path(sys.argv[2])))))
